"""The training commands' arguments: recipes, overrides, and what is refused before anything is loaded."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import DPOConfig, GRPOConfig, ScriptArguments, SFTConfig
from trl.scripts.grpo import GRPOScriptArguments

from peft_steer import JointSteerLoraConfig, SteerConfig
from peft_steer.train import dpo, grpo, sft
from peft_steer.train.arguments import parse
from peft_steer_cli import main


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*/*.yaml"))
TRAINERS = {
    "sft": (ScriptArguments, SFTConfig),
    "grpo": (GRPOScriptArguments, GRPOConfig),
    "dpo": (ScriptArguments, DPOConfig),
}
CPU = ["--use_cpu", "--bf16", "false"]  # what a recipe for a GPU needs to be parsed on a machine without one


def parsed(*argv: str, trainer: str = "sft"):
    return parse([*argv, *CPU], f"peft-steer {trainer}", *TRAINERS[trainer])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "-".join(path.with_suffix("").parts[-3:]))
def test_shipped_recipes(path, tmp_path):
    model, trainer, method = path.with_suffix("").parts[-3:]
    arguments = parsed("--config", str(path), "--output_dir", str(tmp_path), trainer=trainer)
    config = arguments.peft_config
    classes = {"post_block": SteerConfig, "loreft": SteerConfig, "joint": JointSteerLoraConfig, "lora": LoraConfig}
    assert type(config) is classes.get(method, type(None))
    assert config is None or config.task_type == "CAUSAL_LM"
    if type(config) is SteerConfig:
        assert (config.site, config.kind) in {("block", "linear"), ("block", "nonlinear"), ("mlp", "loreft")}
    text = path.read_text()
    assert f"peft-steer {trainer} --config recipes/{model}/{trainer}/{method}.yaml\n" in text
    assert f"output_dir: results/{model}-{trainer}-{method}\n" in text
    assert arguments.model.load_in_4bit == (model == "llama-3.1-8b")


def test_there_is_a_recipe_for_every_model_trainer_and_method():
    methods = [path.stem for path in RECIPES]
    assert {method: methods.count(method) for method in methods} == dict.fromkeys(
        ("joint", "lora", "loreft", "post_block"), 5 * 3
    ) | {"full": 1}


@pytest.fixture
def recipe(tmp_path):
    def write(**keys) -> list[str]:
        path = tmp_path / "recipe.yaml"
        keys = {"output_dir": str(tmp_path / "out"), "model_name_or_path": "m", "task": "listops_short", **keys}
        path.write_text(json.dumps({name: value for name, value in keys.items() if value is not None}))
        return ["--config", str(path)]

    return write


def test_the_command_line_wins_over_the_recipe(recipe):
    arguments = parsed(*recipe(peft_type="STEER", r=4, kind="vector", learning_rate="1e-3"), "--kind", "linear")
    assert arguments.peft_config == SteerConfig(r=4, kind="linear", task_type="CAUSAL_LM")
    assert arguments.training.learning_rate == 1e-3
    arguments = parsed(*recipe(peft_type="STEER"), "--rank_pattern", "{layers.0: 2}", "--scale", "5e-1")
    assert arguments.peft_config.rank_pattern == {"layers.0": 2}
    assert arguments.peft_config.scale == 0.5


def test_the_parameters_of_a_task(recipe):
    assert parsed(*recipe(metadata={"max_depth": 1})).task.metadata == {"max_depth": 1}
    changed = parsed(*recipe(metadata={"max_depth": 1}), "--metadata", '{"max_depth": 3}')
    assert changed.task.metadata == {"max_depth": 3}


def test_any_peft_config_with_its_own_defaults(recipe):
    # TRL has flags of the same names, with other defaults.
    for flag in ("--lora_alpha", "--lora-alpha"):
        arguments = parsed(*recipe(peft_type="LORA", target_modules="all-linear"), flag, "7")
        assert arguments.peft_config == LoraConfig(target_modules="all-linear", lora_alpha=7, task_type="CAUSAL_LM")
    for flags in ([], ["--target_modules", "'[qv]_proj'"]):
        config = parsed(*recipe(peft_type="LORA", target_modules="[qv]_proj"), *flags).peft_config
        assert config.target_modules == "[qv]_proj"  # and not a list, as YAML would have it
    arguments = parsed(*recipe(peft_type="JOINT_STEER_LORA", lora_dropout=0.5, steer_r=2, steer_learning_rate=1e-3))
    assert (arguments.peft_config.lora_dropout, arguments.peft_config.steer_r) == (0.5, 2)
    assert arguments.steer_learning_rate == 1e-3


def test_without_a_peft_type_trl_decides(recipe):
    assert parsed(*recipe()).peft_config is None
    lora = parsed(*recipe(use_peft=True, lora_r=3)).peft_config
    assert isinstance(lora, LoraConfig)
    assert lora.r == 3


@pytest.mark.parametrize(
    ("keys", "flags", "message"),
    [
        ({"learning_rat": 1}, [], "learning_rat: unknown key, did you mean 'learning_rate'"),
        ({}, ["--learnin_rate", "1"], "--learnin_rate: unknown argument, did you mean 'learning_rate'"),
        ({"kind": "linear"}, [], "kind: unknown key. It belongs to an adapter: set `peft_type`, such as STEER"),
        ({}, ["--steer_r", "2"], "set `peft_type`, such as JOINT_STEER_LORA"),
        ({"peft_type": "STEERING"}, [], "peft_type: unknown 'STEERING', did you mean 'STEER'"),
        ({"peft_type": "STEER", "kind": "liner"}, [], "`kind='liner'` is unknown"),
        ({"peft_type": "STEER"}, ["--lora_r", "2"], "lora_r: belongs to TRL's --use_peft.* use `r`"),
        ({"peft_type": "STEER", "use_dora": True}, [], "use_dora: belongs to TRL's --use_peft.* remove it"),
        ({"peft_type": "STEER", "steer_learning_rate": 1e-3}, [], "only a joint adapter"),
        ({"peft_type": "STEER", "adapter_name_or_path": "x"}, [], "adapter_name_or_path: .* remove `peft_type`"),
        ({"task": None, "num_fewshot": 2}, [], "num_fewshot: is about a task"),
        ({"task": None, "metadata": {"max_depth": 1}}, [], "metadata: is about a task"),
        ({}, ["--metadata", "{max_depth: 1}"], r"metadata: '\{max_depth: 1\}' is not JSON:"),
        ({"metadata": [1]}, [], r"metadata: \[1\] is not a JSON object"),
        ({"task": None}, [], "nothing to train on"),
        ({"dataset_name": "x"}, [], "dataset_name: `task` is the data"),
        ({"dataset_train_split": "validation"}, [], "dataset_train_split: `task` is the data"),
        ({"peft_type": "STEER"}, ["--lora-r", "2"], "lora_r: belongs to TRL's"),
        ({}, ["--learning_r", "1"], "--learning_r: unknown argument"),
        ({"help": True}, [], "help: unknown key"),
    ],
)
def test_contradictions(recipe, keys, flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(*recipe(**keys), *flags)


@pytest.mark.parametrize("keys", [{"peft_type": "STEER"}, {"peft_type": "JOINT_STEER_LORA"}])
def test_positions_in_wrapped_packs(recipe, keys):
    prefix = "steer_" if "JOINT" in keys["peft_type"] else ""
    keys = {**keys, "packing": True, "packing_strategy": "wrapped", f"{prefix}positions": "last"}
    with pytest.raises(ValueError, match="packing_strategy: 'wrapped' does not say where the prompts are"):
        sft._prepare(parsed(*recipe(**keys)), None, None)


def test_the_recipe_by_an_equals_sign(recipe):
    flag, path = recipe(peft_type="STEER", r=3)
    assert parsed(f"{flag}={path}").peft_config.r == 3


def test_a_recipe_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*absent\.yaml"):
        parsed("--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="a recipe has keys and values"):
        parsed("--config", str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        parsed("--config", str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        (sft, {"reward_metric": "acc"}, "reward_metric: only grpo has a reward"),
        (sft, {"num_fewshot": 2}, "num_fewshot: task 'listops_short' says 0"),
        (sft, {"resume_from_checkpoint": True}, "resume_from_checkpoint: there is no checkpoint in"),
        (sft, {"model_name_or_path": None}, "model_name_or_path: is missing"),
        (sft, {"resume_from_checkpoint": "absent"}, "resume_from_checkpoint: there is no directory 'absent'"),
        (sft, {"early_stopping_patience": 2}, "early_stopping_patience: needs `load_best_model_at_end: true`"),
        (grpo, {}, "output_type 'multiple_choice', only of 'generate_until'"),
        (
            grpo,
            {"task": "list_max_min", "reward_metric": "acc"},
            "reward metric 'acc' is not a metric of task 'list_max_min'",
        ),
        (
            grpo,
            {"task": "list_max_min", "reward_funcs": ["tusk"]},
            "reward_funcs: unknown 'tusk', did you mean 'task'",
        ),
        (grpo, {"task": "list_max_min", "reward_funcs": ["a.b"]}, "'a.b' cannot be imported"),
        (grpo, {"task": "list_max_min", "reward_funcs": ["accuracy_reward"]}, "set `apply_chat_template: true`"),
        (
            grpo,
            {"per_device_train_batch_size": 3},
            "generation_batch_size (3) must be divisible by num_generations (8)",
        ),
        (grpo, {"task": "list_max_min", "use_vllm": True}, "use_vllm: vLLM is not installed"),
        (dpo, {"task": "list_max_min"}, "task 'list_max_min' has no choices"),
        (sft, {"metadata": {"max_depth": 0}}, "max_depth=0"),
    ],
)
def test_refused_before_a_model_is_loaded(command, keys, message, recipe, tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr("trl.trainer.utils.create_model_from_path", lambda *_, **__: pytest.fail("model loaded"))
    keys = {"model_name_or_path": tiny_llama, "peft_type": "STEER", **keys}
    assert main([command.__name__.rpartition(".")[2], *recipe(**keys), *CPU]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_to_train_further_must_be_one_and_belong_to_the_base(recipe, tiny_llama, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    keys = {"model_name_or_path": tiny_llama, "adapter_name_or_path": str(tmp_path / "empty")}
    assert main(["sft", *recipe(**keys), *CPU]) == 2
    assert "has no adapter_config.json, so it is not an adapter" in capsys.readouterr().err
    SteerConfig(base_model_name_or_path="another/base").save_pretrained(tmp_path / "adapter")
    assert main(["sft", *recipe(**{**keys, "adapter_name_or_path": str(tmp_path / "adapter")}), *CPU]) == 2
    assert "is not 'another/base', the base that the adapter" in capsys.readouterr().err
