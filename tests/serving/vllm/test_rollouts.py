"""TRL's trainers, unmodified, with rollouts by an engine in their process: those of the policy in training."""

import json
from pathlib import Path

import pytest
import torch
from engines import run_training, save_model
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"))


def differences(found: dict) -> list[float]:
    """Of each step, the largest difference of the engine's log-probabilities from the policy's."""
    name = "sampling/sampling_logp_difference/max"
    return [entry[name] for entry in found["history"] if name in entry]


CASES = {
    "grpo_silu_compiled": {"config": {"kind": "nonlinear"}, "engine": {"enforce_eager": False}},
    # `c` is zero at the start and must be there nevertheless
    "grpo_direft": {"config": {"kind": "direft", "activation": "tanh"}, "options": {"gradient_accumulation_steps": 2}},
    # LoRA is merged for the engine and not for the policy, which rounds differently: large weights make much of that
    "grpo_joint": {
        "method": "joint",
        "config": {"kind": "nonlinear"},
        "options": {"learning_rate": 0.005},
        "std": 0.1,
    },
    "rloo_vector": {"config": {"kind": "vector"}},
    "online_dpo_loreft": {"config": {"kind": "loreft", "site": "mlp"}},
}


@pytest.mark.parametrize("case", CASES)
def test_rollouts_come_from_the_policy(base, tmp_path, case):
    trainer = case.rpartition("_")[0] if case == "online_dpo_loreft" else case.partition("_")[0]
    found = run_training(tmp_path, base, trainer=trainer, **CASES[case])
    assert found["error"] is None, found["log"]
    assert found["policy"] < 1e-4
    assert found["base"] > 0.1
    assert found["left"] == []
    steps = differences(found)
    assert len(steps) == (4 if trainer == "grpo" else 0)  # the others do not log it
    assert all(x < 1e-4 for x in steps), steps


def test_rollouts_of_the_base_would_be_seen(base, tmp_path):
    """The checks above fail where nothing is pushed."""
    nothing = "trainer.vllm_generation.sync_weights = lambda: None"
    found = run_training(tmp_path, base, config={"kind": "nonlinear"}, before=nothing)
    assert found["error"] is None, found["log"]
    assert all(x > 0.5 for x in differences(found))
    assert found["policy"] > 0.5
    assert found["base"] < 1e-4


def test_a_trainer_that_leaves_edits_out_is_stopped(base, tmp_path):
    """As a version of TRL with another filter would: the first synchronization raises, and nothing is left behind."""
    other_filter = """
generation = trainer.vllm_generation
named = generation._iter_named_params
generation._iter_named_params = lambda: (x for x in named() if not x[0].endswith("live_B"))
"""
    found = run_training(tmp_path, base, config={"kind": "nonlinear"}, before=other_filter)
    assert "tensors of the edits did not reach the engine" in found["error"]
    assert found["left"] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [({"kind": "lofit", "site": "heads"}, "biases"), ({"kind": "linear", "positions": "prompt"}, "cannot be merged")],
)
def test_what_no_engine_can_follow_raises_at_the_first_synchronization(base, tmp_path, config, message):
    found = run_training(tmp_path, base, config=config)
    assert message in found["error"]
    assert "No vLLM engine follows this model" in found["error"]
    assert "This engine does not follow the steered model in training" in found["log"]


_RECORD = """
import json
import vllm.model_executor.models.llama as llama
pushed, turns = [], []
load, turn = llama.LlamaModel.load_weights, trainer._generate_single_turn
def load_weights(self, weights):
    weights = list(weights)
    pushed.extend(name for name, _ in weights)
    return load(self, iter(weights))
def recorded(*args, **kwargs):
    turns.append(turn(*args, **kwargs))
    with open({file!r}, "w") as file:
        json.dump({{"turns": [ids for ids, _ in turns], "pushed": pushed}}, file)
    return turns[-1]
llama.LlamaModel.load_weights, trainer._generate_single_turn = load_weights, recorded
"""
_REPLAY = """
import json
with open({file!r}) as file:
    turns = iter(json.load(file)["turns"])
trainer._generate_single_turn = lambda *args, **kwargs: (next(turns), None)
"""


def test_the_adapter_is_the_one_that_transformers_trains(base, tmp_path):
    """With the same rollouts; of a frozen base nothing is pushed."""
    file, common = str(tmp_path / "rollouts.json"), {"config": {"kind": "nonlinear"}}
    states = {}
    for name, before, options in (("vllm", _RECORD, {}), ("transformers", _REPLAY, {"use_vllm": False})):
        save = str(tmp_path / name)
        found = run_training(
            tmp_path / f"run-{name}", base, **common, before=before.format(file=file), options=options, save=save
        )
        assert found["error"] is None, found["log"]
        states[name] = load_file(f"{save}/adapter_model.safetensors")
    assert json.loads(Path(file).read_text())["pushed"] == []
    assert states["vllm"].keys() == states["transformers"].keys()
    for name, x in states["vllm"].items():
        torch.testing.assert_close(x, states["transformers"][name], atol=2e-3, rtol=0)


def test_a_quantized_policy(tmp_path):
    """A 4-bit base in training; the engine's is what its weights stand for."""
    pytest.importorskip("bitsandbytes")
    import transformers as tf
    from bitsandbytes.functional import dequantize_4bit

    folder = save_model(tmp_path / "base")
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if hasattr(module, "quant_state") or type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight.view_as(plain.get_submodule(name).weight))
    plain.save_pretrained(folder)  # which quantizes to the same 4 bits
    found = run_training(tmp_path, folder, config={"kind": "nonlinear"}, base="nf4")
    assert found["error"] is None, found["log"]
    assert found["policy"] < 2e-2  # bitsandbytes multiplies in bfloat16 where the processor can
    assert found["base"] > 0.1


def test_resumed(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = run_training(tmp_path, base, config={"kind": "nonlinear"}, options=options, randomize=False)
    assert first["error"] is None, first["log"]
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    found = run_training(tmp_path, base, config={"kind": "nonlinear"}, resume=checkpoint, randomize=False)
    assert found["error"] is None, found["log"]
    assert found["policy"] < 1e-4
    steps = differences(found)
    assert len(steps) == 4
    assert all(x < 1e-4 for x in steps)
