"""lm-evaluation-harness's own command line, knowing our tuner types and tasks, and several adapters on one base:

    peft-steer lm-eval --model peft-steer --model_args "pretrained=MODEL,peft=[None,DIR_A,DIR_B]" --tasks listops

evaluates the base alone and each adapter. Each has the table and the result files of a run of its own; the base is
loaded once.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lm_eval.tasks
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import sanitize_model_name, setup_logging, simple_parse_args_string
from peft import PeftConfig

from peft_steer.evaluation.lm import PeftSteerLM  # (registers the model `peft-steer`, and the tuner types with it)
from peft_steer.evaluation.tasks import OUR_TASKS
from peft_steer.utils.errors import UsageError, usage_errors
from peft_steer.utils.yaml import parse_yaml


class _TaskManager(lm_eval.tasks.TaskManager):
    """Adds our tasks to the folder of `--include_path`: lm-eval's command line takes one path only."""

    def __init__(self, *args: Any, include_path: str | None = None, **kwargs: Any) -> None:
        paths = [str(OUR_TASKS), *([include_path] if include_path else [])]
        super().__init__(*args, include_path=paths, **kwargs)


def main(argv: list[str]) -> int:
    """Runs `peft-steer lm-eval`. All arguments are lm-eval's, except that `peft` in `--model_args` may be a list.

    Raises:
        UsageError: If that list cannot be used as given.
    """
    lm_eval.tasks.TaskManager = _TaskManager  # where the subcommands run, ls and validate import it from
    sys.argv = ["peft-steer lm-eval", *argv]
    setup_logging()
    cli = HarnessCLI()
    arguments = cli.parse_args()
    runs = _runs(arguments)
    with _one_base():
        for run in runs:
            cli.execute(run)
    return 0


def _runs(arguments: Namespace) -> list[Namespace]:
    """The arguments of each run: one for each adapter, if there are several."""
    if arguments.command != "run":
        return [arguments]
    defaults = EvaluatorConfig.load_yaml_config(arguments.config) if arguments.config else {}
    values = {name: getattr(arguments, name) or defaults.get(name) for name in ("model", "model_args", "use_cache")}
    model_args = values["model_args"] or {}
    if isinstance(model_args, str):
        model_args = simple_parse_args_string(model_args)
    adapters = model_args.get("peft")
    if isinstance(adapters, str) and adapters.startswith("["):  # lm-eval reads a list only if its words are quoted
        adapters = [None if word == "None" else word for word in parse_yaml(adapters)]
    if not isinstance(adapters, (list, tuple)):
        return [arguments]
    if values["model"] != "peft-steer":
        raise UsageError(f"peft={list(adapters)}: several adapters need `--model peft-steer`")
    for adapter in adapters:
        if adapter is not None and (not isinstance(adapter, str) or not adapter):
            raise UsageError(f"peft={list(adapters)}: {adapter!r} is neither an adapter's path nor None, for the base")
    names = [sanitize_model_name("base" if adapter is None else adapter) for adapter in adapters]
    if not names or len(set(names)) < len(names):  # their files would be mixed up
        raise UsageError(f"peft={list(adapters)}: name at least one adapter, and each only once")
    base = {name: value for name, value in model_args.items() if name not in ("peft", "scale")}
    runs = []
    for adapter, name in sorted(zip(adapters, names, strict=True), key=lambda pair: pair[0] is not None):
        if adapter is not None:
            with usage_errors(f"peft={adapter}: "):
                PeftConfig.from_pretrained(adapter, revision=model_args.get("revision"))
        run: dict[str, Any] = {"model_args": base if adapter is None else {**model_args, "peft": adapter}}
        if values["use_cache"]:  # its keys do not say which adapter answered
            run["use_cache"] = f"{values['use_cache']}_{name}"
        runs.append(Namespace(**{**vars(arguments), **run}))
    return runs


@contextmanager
def _one_base() -> Iterator[None]:
    """Within it the runs' `--model peft-steer` is one model, with the adapter of the run."""
    create = PeftSteerLM.create_from_arg_obj
    made: list[PeftSteerLM] = []

    def shared(model_args: dict[str, Any], additional_config: dict[str, Any] | None = None) -> PeftSteerLM:
        if made:
            made[0].load_adapter(model_args.get("peft"), model_args.get("scale"))
        else:
            made.append(create(model_args, additional_config))
        return made[0]

    PeftSteerLM.create_from_arg_obj = staticmethod(shared)
    try:
        yield
    finally:
        del PeftSteerLM.create_from_arg_obj
