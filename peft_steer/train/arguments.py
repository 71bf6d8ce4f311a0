"""The arguments of a recipe: every flag of TRL's own scripts, the fields of any PEFT config, and a task.

The fields of the config that `peft_type` names are flags of their own (`--r 4 --kind linear`), parsed before TRL's.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config

import peft_steer
from peft_steer.utils.errors import UsageError, suggest, usage_errors
from peft_steer.utils.recipes import find_recipe
from peft_steer.utils.yaml import parse_yaml, read_yaml


TASK_PROMPT = ("apply_chat_template", "system_instruction")
# What PEFT writes into a config itself.
_RECORDED = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
# Flags of TRL's own LoRA: with a `peft_type` they would be ignored.
_TRL_LORA = {f.name for f in dataclasses.fields(ModelConfig) if f.name.startswith(("lora_", "use_rslora", "use_dora"))}


@dataclass
class TaskArguments:
    """
    What to train on, beside TRL's `dataset_name` and `datasets`, and from where.

    Args:
        task (`str`, *optional*):
            An lm-eval task: its training split is the data, and its metric the reward of GRPO.
        include_path (`str`, *optional*):
            A folder with more lm-eval tasks.
        num_fewshot (`int`, *optional*):
            Examples in a prompt, instead of the task's own number.
        metadata (`dict`, *optional*):
            Parameters of the task's data, as lm-eval's `--metadata` (JSON on the command line).
        apply_chat_template (`bool`):
            Whether the task's prompts are chat messages.
        system_instruction (`str`, *optional*):
            The system message, or what stands before the prompt.
        reward_metric (`str`, *optional*):
            `"metric,filter"` as lm-eval prints it; by default the task's first.
        adapter_name_or_path (`str`, *optional*):
            An adapter to train further.
        early_stopping_patience (`int`, *optional*):
            Evaluations without an improvement before the training stops.
    """

    task: str | None = field(default=None, metadata={"help": "lm-eval task: the training data, and GRPO's reward."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with more lm-eval tasks."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in a prompt (default: the task's)."})
    metadata: str | None = field(
        default=None, metadata={"help": "Parameters of the task's data, as lm-eval's: '{\"max_depth\": 6}'."}
    )
    apply_chat_template: bool = field(default=False, metadata={"help": "Make the task's prompts chat messages."})
    system_instruction: str | None = field(default=None, metadata={"help": "System message of the task's prompts."})
    reward_metric: str | None = field(
        default=None, metadata={"help": "The task's 'metric,filter' that is GRPO's reward (default: its first)."}
    )
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "An adapter to train further."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without an improvement before the training stops."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.metadata, str):
            try:
                self.metadata = json.loads(self.metadata)
            except json.JSONDecodeError as error:
                raise UsageError(f"metadata: {self.metadata!r} is not JSON: {error}") from error
        if not isinstance(self.metadata, (dict, type(None))):
            raise UsageError(f"metadata: {self.metadata!r} is not a JSON object")

    @property
    def chat(self) -> dict[str, Any]:
        """How the task's prompts are made, for `peft_steer.evaluation.tasks`."""
        return {name: getattr(self, name) for name in TASK_PROMPT}


@dataclass(frozen=True)
class Arguments:
    """Everything a recipe and its command line say.

    Attributes:
        script, training, model, mixture: as in TRL's scripts.
        task: See [`TaskArguments`].
        peft_config: The adapter to make; None trains the whole model, or the adapter `task.adapter_name_or_path`.
        steer_learning_rate: The steering half's, of a joint adapter.
    """

    script: Any
    training: Any
    model: ModelConfig
    mixture: DatasetMixtureConfig
    task: TaskArguments
    peft_config: PeftConfig | None
    steer_learning_rate: float | None


def parse(argv: list[str], prog: str, script_cls: type, training_cls: type) -> Arguments:
    """Reads a command line and the recipe that `--config` names; the command line wins.

    Raises:
        UsageError: for an unknown key or flag, with the nearest known one, and for values that contradict each other.
        UsageError: if there is no such recipe.
    """
    argv = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    argv = _with_shipped(argv)
    recipe = _recipe(argv)
    config_cls = _config_class(argv, recipe)
    adapter_parser = _adapter_parser(config_cls)
    given, rest = adapter_parser.parse_known_args(argv)
    types: Any = (script_cls, training_cls, ModelConfig, DatasetMixtureConfig, TaskArguments)
    parser = TrlParser(
        types,
        prog=prog,
        usage=f"{prog} --config RECIPE [--FLAG VALUE ...]",
        description="Flags override the recipe: TRL's own, the task's, and at the end the adapter's.",
        epilog=adapter_parser.format_help(),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    known = {action.dest for p in (parser, adapter_parser) for action in p._actions} - {"help"}
    for key in map(str, recipe):
        if key not in known and key != "env":
            raise UsageError(f"{argv[argv.index('--config') + 1]}: {key}: unknown key{_hint(key, known)}")
    with usage_errors(kinds=(ValueError, TypeError)):
        *parsed, _, unknown = parser.parse_args_and_config(
            rest, return_remaining_strings=True, separate_remaining_strings=True
        )
    if unknown:
        raise UsageError(f"{unknown[0]}: unknown argument{_hint(unknown[0].lstrip('-').replace('-', '_'), known)}")
    adapter = {k: v for k, v in recipe.items() if k in {a.dest for a in adapter_parser._actions}} | vars(given)
    rate = adapter.pop("steer_learning_rate", None)
    peft_config = _peft_config(config_cls, adapter, parsed[2])
    _check(parsed[0], parsed[3], parsed[4], peft_config, rate)
    script, training, model, mixture, task = parsed
    return Arguments(
        script, training, model, mixture, task, peft_config, steer_learning_rate=None if rate is None else float(rate)
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _with_shipped(argv: list[str]) -> list[str]:
    """The arguments with the path of a recipe that ships in the place of its name."""
    return [str(find_recipe(word)) if before == "--config" else word for before, word in pairwise(["", *argv])]


def _recipe(argv: list[str]) -> dict[str, Any]:
    if "--config" not in argv:
        return {}
    path = Path(argv[argv.index("--config") + 1]) if argv[-1] != "--config" else None
    if path is None or not path.is_file():
        raise UsageError(f"--config: there is no file {str(path)!r}")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: a recipe has keys and values, this is {recipe!r}")
    return recipe


def _config_class(argv: list[str], recipe: dict[str, Any]) -> type[PeftConfig] | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--peft_type", default=recipe.get("peft_type"))
    name = parser.parse_known_args(argv)[0].peft_type
    known = {member.value: config for member, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name is not None and name not in known:
        raise UsageError(f"peft_type: unknown {name!r}{suggest(str(name), known)}")
    return known[name] if name is not None else None


def _adapter_parser(config_cls: type[PeftConfig] | None) -> argparse.ArgumentParser:
    """The flags of the adapter; without a default, so that only those given are in the result."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    names = "STEER, JOINT_STEER_LORA, LORA or any other of PEFT's"
    adapter = parser.add_argument_group(
        "adapter",
        f"--peft_type NAME --help shows the flags of one (now: {config_cls.__name__ if config_cls else None})",
    )
    adapter.add_argument("--peft_type", help=f"{names}; without it TRL's --use_peft is LoRA")
    adapter.add_argument("--steer_learning_rate", type=float, help="the steering half's, of a joint adapter")
    for f in dataclasses.fields(config_cls) if config_cls else ():
        if f.init and f.name not in _RECORDED:
            text = str(f.metadata.get("help", "")).replace("%", "%%")
            flags = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))  # both, as TRL's
            adapter.add_argument(*flags, dest=f.name, type=_value, metavar="YAML", help=text)
    return parser


def _value(text: str) -> Any:
    """A value as a recipe has it: 8, 1e-3, true, [a, b], {a: 1}, or a string."""
    try:
        return parse_yaml(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error}; quote it twice, as \"'{text}'\"") from error


def _hint(word: str, known: set[str]) -> str:
    for config_cls, name in ((peft_steer.SteerConfig, "STEER"), (peft_steer.JointSteerLoraConfig, "JOINT_STEER_LORA")):
        if word in {f.name for f in dataclasses.fields(config_cls)}:
            return f". It belongs to an adapter: set `peft_type`, such as {name}"
    hint = suggest(word, known)
    return hint if "did you mean" in hint else "; --help shows all of them"


def _peft_config(
    config_cls: type[PeftConfig] | None, adapter: dict[str, Any], model: ModelConfig
) -> PeftConfig | None:
    if config_cls is None:
        return get_peft_config(model)
    fields, defaults = {f.name for f in dataclasses.fields(config_cls)}, ModelConfig()
    for name in sorted(_TRL_LORA - fields):
        if getattr(model, name) != getattr(defaults, name):
            bare = name.removeprefix("lora_")
            instead = f"use `{bare}`" if bare in fields else "remove it"
            raise UsageError(
                f"{name}: belongs to TRL's --use_peft, not to peft_type {adapter['peft_type']}; {instead}"
            )
    values = {k: v for k, v in adapter.items() if k != "peft_type"}
    with usage_errors(kinds=(ValueError, TypeError)):
        return config_cls(**{"task_type": "CAUSAL_LM", **values})


def _check(script: Any, mixture: DatasetMixtureConfig, task: TaskArguments, peft_config: Any, steer_rate: Any) -> None:
    if task.adapter_name_or_path is not None and peft_config is not None:
        raise UsageError("adapter_name_or_path: an adapter that exists has its config; remove `peft_type`/`use_peft`")
    joint = isinstance(peft_config, peft_steer.JointSteerLoraConfig) or task.adapter_name_or_path is not None
    if steer_rate is not None and not joint:
        raise UsageError("steer_learning_rate: only a joint adapter (peft_type JOINT_STEER_LORA) has two halves")
    data_flags = ("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
    if task.task is None:
        _refuse(
            task,
            ("include_path", "num_fewshot", "metadata", *TASK_PROMPT, "reward_metric"),
            "is about a task; name one with `task`",
        )
        if not (script.dataset_name or mixture.datasets):
            raise UsageError("nothing to train on: set `task`, `dataset_name` or `datasets`")
    else:
        _refuse(script, ("dataset_name", *data_flags), "`task` is the data; remove one of the two")
        _refuse(mixture, ("datasets", "streaming", "test_split_size"), "`task` is the data; remove one of the two")


def _refuse(arguments: Any, names: tuple[str, ...], why: str) -> None:
    """Raises for a value that would be ignored."""
    defaults = type(arguments)()
    for name in names:
        if getattr(arguments, name) != getattr(defaults, name):
            raise UsageError(f"{name}: {why}")
