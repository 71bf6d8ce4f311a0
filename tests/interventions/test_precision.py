"""Adapters keep their precision under TRL's trainers, which cast what is trainable on a quantized base to bfloat16."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import BASES, KINDS, METHODS, make, randomize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_steer import SteerConfig


LR, STEPS = 1e-4, 4
COMMON = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}


def edits(model):
    return {n: p for n, p in model.named_parameters() if ".steering." in n}


def cast_behind_the_back(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)


# --- whose wish it is

USES = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict({}, strict=False),
    "to": lambda m: m.to("cpu"),
    "wrapping": lambda m: [list(x.named_parameters(recurse=False)) for x in m.modules()],  # as DDP and FSDP2 do
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("method", METHODS)
def test_a_cast_of_data_is_undone(method, use):
    model = get_peft_model(make(dtype=torch.bfloat16), METHODS[method](kind="nonlinear", task_type="CAUSAL_LM"))
    randomize(model)  # in place, as an optimizer updates
    expected = {name: p.detach().clone() for name, p in edits(model).items()}
    assert {p.dtype for p in expected.values()} == {torch.float32}
    cast_behind_the_back(model)
    USES[use](model)
    assert all(torch.equal(p, expected[name]) for name, p in edits(model).items())


@pytest.mark.parametrize("kind", ["vector", "silu", "loreft"])
def test_a_wish_is_respected(kind):
    config = SteerConfig(**KINDS[kind], task_type="CAUSAL_LM")
    half = get_peft_model(make(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in edits(half.train()).values()} == {torch.bfloat16}
    model = get_peft_model(make(), copy.deepcopy(config))
    randomize(model)
    model.to(torch.bfloat16).train()
    assert {p.dtype for p in edits(model).values()} == {torch.bfloat16}
    for p in model.parameters():
        p.data = p.data.float()  # widening loses nothing
    assert {p.dtype for p in edits(model.train()).values()} == {torch.float32}


def test_new_values_are_not_undone():
    """A narrower tensor that is no cast of the old one is somebody's new value."""
    model = get_peft_model(make(), SteerConfig(kind="vector", task_type="CAUSAL_LM"))
    randomize(model)
    for p in edits(model).values():
        p.data = torch.ones_like(p, dtype=torch.bfloat16)
    assert all(torch.equal(p, torch.ones_like(p, dtype=torch.bfloat16)) for p in edits(model.train()).values())


def test_a_copy_keeps_its_own():
    model = get_peft_model(make(), SteerConfig(kind="nonlinear", task_type="CAUSAL_LM"))
    twin = copy.deepcopy(model)
    randomize(twin)
    expected = {name: p.detach().clone() for name, p in edits(twin).items()}
    cast_behind_the_back(twin)
    assert all(torch.equal(p, expected[name]) for name, p in edits(twin.train()).items())


# --- trainers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """`tiny_llama` at the width of bitsandbytes' blocks."""
    path = tmp_path_factory.mktemp("base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama, hidden_size=64, intermediate_size=128, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def data():
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)])


def grown(folder, base, config, std=0.5):
    """An adapter on a quantized base, with values that a step of LR cannot move in bfloat16."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, **BASES[base]), config)
    randomize(model, std=std)
    return model


def hidden_from_trl(model):
    """The reference: TRL does not see that the base is quantized, and leaves the adapter in float32."""
    model.get_base_model().is_loaded_in_4bit = model.get_base_model().is_loaded_in_8bit = False
    return model


def sft(model, folder, data, output, resume=None, **options):
    args = SFTConfig(str(output), **{**COMMON, "max_steps": STEPS, "save_steps": STEPS // 2, **options})
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return edits(trainer.model)


@pytest.mark.parametrize(
    ("base", "kind"),
    [("nf4", "vector"), ("nf4", "silu"), ("nf4", "loreft"), ("nf4_double", "vector"), ("int8", "vector")],
)
def test_sft_moves_as_in_float32(tmp_path, folder, data, base, kind):
    def config():
        return SteerConfig(r=4, **KINDS[kind], task_type="CAUSAL_LM")

    start = {name: p.detach().clone() for name, p in edits(grown(folder, base, config())).items()}
    expected = sft(hidden_from_trl(grown(folder, base, config())), folder, data, tmp_path / "reference")
    model = grown(folder, base, config())
    found = sft(model, folder, data, tmp_path / "out")
    for name, p in found.items():
        assert torch.equal(p, expected[name])
        moved = (p - start[name]).abs()
        assert (moved > LR / 10).float().mean() > 0.9
        assert moved.max() < 1.1 * STEPS * LR  # and by no rounding
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, **BASES[base]), tmp_path / "out")
    assert all(torch.equal(p, found[name]) for name, p in edits(loaded).items())


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_joint_sft(tmp_path, folder, data, base):
    """The steering half in float32; LoRA's half as TRL has it, in bfloat16."""
    config = METHODS["joint"](kind="nonlinear", task_type="CAUSAL_LM")
    model = grown(folder, base, config, std=0.2)
    start = {name: p.detach().clone() for name, p in edits(model).items()}
    found = sft(model, folder, data, tmp_path)
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad and n not in found} == {torch.bfloat16}
    for name, p in found.items():
        if "W_up" in name:  # `W_down` is projected as well
            assert p.dtype == torch.float32
            assert ((p - start[name]).abs() > LR / 10).float().mean() > 0.9


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_resumed_sft_is_bit_equal(tmp_path, folder, data, base):
    config = SteerConfig(kind="vector", task_type="CAUSAL_LM")
    whole = sft(grown(folder, base, config), folder, data, tmp_path)
    resumed = sft(grown(folder, base, config), folder, data, tmp_path, str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert all(torch.equal(p, whole[name]) for name, p in resumed.items())


def test_grpo_step(tmp_path, folder, data):
    def step(model, output):
        args = GRPOConfig(
            str(output),
            **COMMON,
            max_steps=1,
            num_generations=4,
            max_completion_length=4,
            save_strategy="no",
            beta=0.1,
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **kwargs: [float(len(set(c))) for c in completions],
            args=args,
            train_dataset=data.remove_columns("completion"),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
        return edits(trainer.model)

    def model():
        return grown(folder, "nf4", SteerConfig(kind="vector", task_type="CAUSAL_LM"), std=0.1)

    start = {name: p.detach().clone() for name, p in edits(model()).items()}
    found, expected = step(model(), tmp_path), step(hidden_from_trl(model()), tmp_path)
    policy = [name for name in found if ".ref." not in name]
    assert all(torch.equal(found[name], expected[name]) for name in policy)
    assert all(((found[name] - start[name]).abs() > LR / 10).float().mean() > 0.9 for name in policy)
