"""What only a joint adapter has: the projection, the step counter, two halves, two learning rates."""

import copy
import pickle
import socket

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import two_processes
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import ARCHITECTURES, inputs, joint_config, make, randomize, reference_delta, steer_layers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from trl import SFTConfig, SFTTrainer

from peft_steer import (
    JointOptimizer,
    JointSteerLoraConfig,
    JointSteerLoraModel,
    SteerConfig,
    joint_optimizer,
    orthogonality,
    project_,
)
from peft_steer.joint.projection import overlap, project, projected


TOLERANCE = 1e-5
MODES = {
    "always": {"orthogonal": "always"},
    "periodic": {"orthogonal": "periodic", "orthogonal_interval": 2},
    "none": {"orthogonal": "none"},
}


def joint(architecture="llama", dtype=torch.float32, **config):
    config = {"r": 4, "steer_r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(make(architecture, dtype), JointSteerLoraConfig(**config)).eval()


def logits(model, architecture="llama", **kwargs):
    with torch.no_grad():
        return model(**inputs(architecture), **kwargs).logits


def train(model, steps=4, lr=0.01, **options):
    x = inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    for _ in range(steps):
        model(**x, labels=x["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def worst(model, name="default"):
    return max(orthogonality(model, name).values())


def adapter_state(model):
    return {n: x.detach().clone() for n, x in model.state_dict().items() if ".default." in n}


# --- the projection


def by_qr(W, B):
    Q, _ = torch.linalg.qr(B.double())
    return W.double() - (W.double() @ Q) @ Q.T


@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
@pytest.mark.parametrize(("d", "r", "r_lora"), [(32, 4, 2), (576, 8, 8), (1024, 8, 32)])
def test_projection(d, r, r_lora, condition):
    torch.manual_seed(0)
    columns = torch.randn(d, r_lora) * torch.logspace(0, -torch.tensor(condition).log10().item(), r_lora)
    mixed = columns @ torch.linalg.qr(torch.randn(r_lora, r_lora))[0]
    W = 1e-3 * torch.randn(r, d)
    for B in (columns, mixed):
        assert overlap(W, B) > 1e-3
        assert overlap(project(W, B), B) < TOLERANCE
        once = projected(W, B)
        assert torch.equal(projected(once, B), once)
    reference = by_qr(W, columns)
    assert (project(W, columns).double() - reference).norm() < 1e-6 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projection_survives_rounding(dtype):
    torch.manual_seed(0)
    W, B = torch.randn(8, 576).to(dtype), torch.randn(576, 8).to(dtype)
    assert overlap(project(W, B).to(dtype), B) > TOLERANCE
    once = projected(W, B)
    assert once.dtype == dtype
    assert overlap(once, B) < TOLERANCE
    assert torch.equal(projected(once, B), once)
    assert (once.double() - by_qr(W, B)).norm() < 2 * torch.finfo(dtype).eps * W.double().norm()


def test_gradcheck():
    torch.manual_seed(0)
    W = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    B = torch.randn(16, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, (W, B))


def test_projection_at_zero():
    """As LoRA starts: nothing is removed, and no gradient is NaN; a column that is still zero takes no part."""
    W, B = torch.randn(3, 16, requires_grad=True), torch.zeros(16, 4, requires_grad=True)
    out = project(W, B)
    out.square().sum().backward()
    assert torch.equal(out, W)
    torch.testing.assert_close(W.grad, 2 * W)
    assert torch.equal(B.grad, torch.zeros_like(B))
    some = torch.randn(16, 4)
    some[:, 1:3] = 0
    torch.testing.assert_close(project(W, some).double(), by_qr(W, some[:, [0, 3]]), rtol=1e-5, atol=1e-6)


# --- the model


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "bloom"])
def test_the_model_computes_the_equation(architecture, kind):
    """LoRA, and behind every block `dh` with the projected `W_down`: so does the base with plain hooks."""
    x = inputs(architecture)
    model = joint(architecture, steer_kind=kind, orthogonal="always", steer_scale=0.5)
    assert torch.equal(model(**x).logits, make(architecture)(**x).logits)
    randomize(model, std=0.5)
    base = make(architecture)
    merged = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            A, B = (p["default"].weight.detach().double() for p in (module.lora_A, module.lora_B))
            delta = module.scaling["default"] * (B @ A)
            weight = base.get_submodule(name).weight
            weight.data += (delta if isinstance(base.get_submodule(name), torch.nn.Linear) else delta.T).to(
                weight.dtype
            )
            merged[name] = B
    ends = {
        n.rsplit(".", 1)[0]: B for n, B in merged.items() if n.endswith(("down_proj", "mlp.c_proj", "fc2", "4h_to_h"))
    }
    for name, layer in steer_layers(model.get_base_model()).items():
        (B,) = [B for end, B in ends.items() if end == name or end.startswith(f"{name}.")]
        edit = layer.steer_edit["default"]
        W = by_qr(edit.W_down.detach(), B)
        act = F.silu if kind == "nonlinear" else (lambda z: z)

        def steer(module, args, output, W=W, edit=edit, act=act):
            h = output[0] if isinstance(output, tuple) else output
            steered = (h.double() + 0.5 * act(h.double() @ W.T) @ edit.W_up.detach().double().T).float()
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        base.get_submodule(name).register_forward_hook(steer)
    expected = base(**x).logits
    torch.testing.assert_close(model(**x).logits, expected, rtol=1e-3, atol=1e-4)
    assert (expected - make(architecture)(**x).logits).abs().max() > 1e-2
    assert worst(model) < TOLERANCE


@pytest.mark.parametrize("kind", ["vector", "loreft"])
def test_kinds_without_the_constraint(kind):
    model = joint(steer_kind=kind)
    randomize(model)
    edit = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"]
    h = torch.randn(3, 32)
    torch.testing.assert_close(edit.delta(h).expand(3, 32).double(), reference_delta(edit, h), rtol=1e-4, atol=1e-5)
    assert orthogonality(model) == {}


def test_settings_of_lora_keep_working():
    """Each acts as in plain LoRA: with the steering half off, the logits are the same."""
    settings = [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 2), (1, 3)]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.0\.self_attn\..*"},
    ]
    for setting in settings:
        plain = {"r": 4, "target_modules": "all-linear", **setting}
        model = joint(orthogonal="always", **plain)
        lora = get_peft_model(make(), LoraConfig(**plain)).eval()
        lora_names = [n for n, _ in lora.named_parameters()]
        assert [n for n, _ in model.named_parameters() if ".steering." not in n] == lora_names
        randomize(model, std=0.2)
        lora.load_state_dict({n: x for n, x in model.state_dict().items() if ".steering." not in n})
        both = logits(model)
        with model.set_halves("lora"):
            assert torch.equal(logits(model), logits(lora)), setting
        assert not torch.allclose(both, logits(lora))
        assert worst(model) < TOLERANCE


def test_file(tmp_path):
    """Saving projects, the model in memory too; loading and projecting again changes nothing."""
    for mode, config in MODES.items():
        model = joint(**config)
        randomize(model, std=0.5)
        raw = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"].W_down.detach().clone()
        model.save_pretrained(tmp_path / mode)
        saved = adapter_state(model)
        expected = logits(model)
        loaded = PeftModel.from_pretrained(make(), tmp_path / mode)
        assert adapter_state(loaded).keys() == saved.keys()
        assert all(torch.equal(x, saved[n]) for n, x in adapter_state(loaded).items())
        assert torch.equal(logits(loaded), expected)
        W = steer_layers(loaded.get_base_model())["model.layers.0"].steer_edit["default"].W_down
        assert torch.equal(W, raw) == (mode == "none")
        assert (worst(loaded) < TOLERANCE) == (mode != "none")
        project_(loaded)
        assert worst(loaded) < TOLERANCE
        assert torch.equal(logits(loaded), expected) == (mode != "none")


@pytest.mark.parametrize("mode", MODES)
def test_saving_below_checkpoint_wrappers(mode):
    """As FSDP's `fsdp_activation_checkpointing` puts them around the blocks."""
    model = joint(**MODES[mode])
    randomize(model, std=0.5)
    other = copy.deepcopy(model)
    expected = get_peft_model_state_dict(model)
    apply_activation_checkpointing(other, check_fn=lambda module: "DecoderLayer" in type(module).__name__)
    assert any("_checkpoint_wrapped_module" in name for name, _ in other.named_modules())
    found = get_peft_model_state_dict(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("mode", MODES)
def test_overlap_in_training(mode):
    model = joint(**MODES[mode]).train()
    overlaps = []
    x = inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 7):
        for _ in range(3):  # gradient accumulation
            (model(**x, labels=x["input_ids"]).loss / 3).backward()
            assert worst(model) < TOLERANCE or mode != "always"
        optimizer.step()
        optimizer.zero_grad()
        overlaps.append(worst(model))
        assert (overlaps[-1] < TOLERANCE) == (mode == "always" or (mode == "periodic" and step % 2 == 0)), step


def test_gradients_reach_both_halves():
    model = joint(orthogonal="always").train()
    randomize(model)
    x = inputs()
    model(**x, labels=x["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads.values())
    layer = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"]
    assert overlap(layer.W_down.grad, layer.B) < 1e-4  # what the projection removes has no gradient


def test_copies_are_projected_too():
    """An optimizer step finds the parameters of a copied or unpickled model, and no others."""
    model = joint(orthogonal="periodic", orthogonal_interval=1)
    randomize(model)
    other = copy.deepcopy(model)
    third = pickle.loads(pickle.dumps(model))
    before = adapter_state(model)
    train(other.train(), steps=1)
    assert worst(other) < TOLERANCE < worst(model)
    assert all(torch.equal(x, before[n]) for n, x in adapter_state(model).items())
    train(third.train(), steps=1)
    assert worst(third) < TOLERANCE < worst(model)


def test_several_adapters():
    model = joint(orthogonal="always")
    model.add_adapter("other", joint_config(r=2, kind="linear"))
    randomize(model, std=0.5)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if f".{name}." in n
        }
        assert worst(model, name) < TOLERANCE
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits(model), alone["default"])
    with torch.no_grad():
        rows = model(**inputs(rows=4), adapter_names=["other", "__base__", "default", "other"]).logits
        for row, name in enumerate(["other", None, "default", "other"]):
            if name is None:
                with model.disable_adapter():
                    expected = model(**inputs(rows=4)).logits[row]
            else:
                model.set_adapter(name)
                expected = model(**inputs(rows=4)).logits[row]
            torch.testing.assert_close(rows[row], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**inputs(), adapter_names=["default", "typo"])
    model.delete_adapter("other")
    assert not any(".other." in n for n, _ in model.named_parameters())
    model.set_adapter("default")
    assert torch.equal(logits(model), alone["default"])


def test_halves():
    model = joint()
    randomize(model, std=0.3)
    plain, both = logits(make()), logits(model)
    seen = {}
    for halves in ("lora", "steer"):
        with model.set_halves(halves):
            seen[halves] = logits(model)
            with model.disable_adapter():
                assert torch.equal(logits(model), plain)
            assert torch.equal(logits(model), seen[halves])
        assert torch.equal(logits(model), both)
    model.set_halves("steer")
    assert torch.equal(logits(model), seen["steer"])
    steering = get_peft_model(make(), SteerConfig(r=4, kind="nonlinear")).eval()
    for name, layer in steer_layers(steering.get_base_model()).items():
        edit = steer_layers(model.get_base_model())[name].steer_edit["default"]
        layer.steer_edit["default"].W_down.data.copy_(edit.W_read)
        layer.steer_edit["default"].W_up.data.copy_(edit.W_up)
    torch.testing.assert_close(logits(steering), seen["steer"])
    model.add_adapter("other", joint_config(r=2, init_weights=False))
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, plain)
    model.set_halves("lora")
    assert torch.equal(logits(model), plain)  # whose LoRA half is still zero
    model.set_halves("both")
    model.set_adapter("default")
    assert torch.equal(logits(model), both)
    with pytest.raises(ValueError, match="`halves='none'` is unknown; choose one of 'both', 'lora', 'steer'"):
        model.set_halves("none")


def test_one_half_can_be_trained():
    model = joint(orthogonal="always").train()
    before = adapter_state(model)
    with model.set_halves("lora"):
        train(model, weight_decay=0.0)
    changed = {n for n, x in adapter_state(model).items() if not torch.equal(x, before[n])}
    assert {n for n in changed if not n.endswith("W_down")} == {n for n in before if ".steering." not in n}
    assert worst(model) < TOLERANCE


def test_scale():
    model = joint(steer_kind="vector")
    randomize(model, std=0.3)
    full = logits(model)
    model.set_scale("default", 0)
    assert torch.equal(logits(model), logits(make()))
    model.set_scale("default", 2.0)
    assert not torch.equal(logits(model), full)
    model.unscale_layer()
    assert torch.equal(logits(model), full)


@pytest.mark.parametrize("kind", ["vector", "linear", "nonlinear", "loreft"])
@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_merging_lora(tmp_path, kind, names):
    model = joint(steer_kind=kind, steer_scale=0.5)
    model.add_adapter("other", joint_config(r=2, kind="linear", use_bias=True))
    randomize(model, std=0.2)
    model.base_model.set_adapter(names)
    model.set_scale("default", 1.5)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged: .* `merge_lora_and_unload\(\)`"):
            merge()
    merged = model.merge_lora_and_unload()
    assert [type(merged.peft_config[name]) for name in names] == [SteerConfig] * len(names)
    assert list(merged.peft_config) == names
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "adapter")
    strengths = {n: m.scaling[n] for m in steer_layers(merged.get_base_model()).values() for n in m.scaling}
    merged.unload().save_pretrained(tmp_path / "base")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    for name in names[1:]:
        again.load_adapter(tmp_path / "adapter" / name, name)
    again.base_model.set_adapter(names)
    again.set_scale("default", 1.5)
    assert {n: m.scaling[n] for m in steer_layers(again.get_base_model()).values() for n in m.scaling} == strengths
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)


def test_merging_lora_keeps_trained_modules():
    config = tf.LlamaConfig(**{**make().config.to_dict(), "num_labels": 3})
    base = tf.LlamaForSequenceClassification(config).eval()
    model = get_peft_model(base, JointSteerLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")).eval()
    randomize(model, std=0.2)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model)
    merged = model.merge_lora_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert any("score" in name for name in get_peft_model_state_dict(merged))


def test_compile_without_graph_breaks():
    model = joint(orthogonal="always")
    randomize(model)
    x = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for m in (model, compiled):
        model.zero_grad()
        out = m(**x).logits
        out.square().sum().backward()
        gradients.append((out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_registration():
    assert PeftType("JOINT_STEER_LORA") is JointSteerLoraConfig().peft_type
    assert JointSteerLoraModel.prefix == "lora_"


def test_config_file(tmp_path):
    JointSteerLoraConfig(
        r=3, steer_r=5, steer_kind="linear", orthogonal="periodic", orthogonal_interval=7
    ).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, JointSteerLoraConfig)
    assert (config.r, config.steer_r, config.steer_kind) == (3, 5, "linear")
    assert (config.orthogonal, config.orthogonal_interval) == ("periodic", 7)
    assert (config.steer_config().r, config.steer_config().kind) == (5, "linear")


# --- TRL's trainer, unchanged


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_llama):
    """A tiny Llama that is 64 wide, bitsandbytes' block size, with a tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(path)
    return path


BASES = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "nf4": {"quantization_config": tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
    "int8": {"quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True)},
}


def trainer(checkpoint, output, base="fp32", model=None, config=None, trainer_options=None, **options):
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 3}
    settings |= {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 0.01}
    settings |= {"per_device_train_batch_size": 4, **options}
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    return SFTTrainer(
        model=model or tf.AutoModelForCausalLM.from_pretrained(checkpoint, **BASES[base]),
        args=SFTConfig(output_dir=str(output), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tf.AutoTokenizer.from_pretrained(checkpoint),
        peft_config=None if model else config or joint_config(),
        **(trainer_options or {}),
    )


def config_for(mode, interval=3):
    options = {**MODES[mode], "orthogonal_interval": interval} if mode == "periodic" else MODES[mode]
    return JointSteerLoraConfig(r=4, steer_r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("mode", ["always", "periodic"])
@pytest.mark.parametrize("base", BASES)
def test_sft_on_every_base(tmp_path, checkpoint, base, mode):
    """It learns; the base stays as it is; what is saved satisfies the constraint and loads equal."""
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint, **BASES[base])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(checkpoint, tmp_path, base, config=config_for(mode), gradient_checkpointing=base != "int8")
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    # 64 columns of bfloat16 have too few bits: rounding leaves 3e-4 of overlap (and below 1e-5 from a width of 500)
    stored = next(x.dtype for n, x in run.model.named_parameters() if "W_down" in n)
    assert stored == (torch.bfloat16 if base in ("nf4", "int8") else torch.float32)
    tolerance = 5e-4 if stored == torch.bfloat16 and mode == "periodic" else TOLERANCE
    assert worst(run.model) < tolerance
    assert all(x.float().abs().sum() > 0 for n, x in adapter_state(run.model).items() if "lora_B" in n or "W_up" in n)
    names = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in run.model.named_parameters()
    }
    assert all(torch.equal(names[n], p) for n, p in frozen.items())
    project_(run.model)
    fresh = tf.AutoModelForCausalLM.from_pretrained(checkpoint, **BASES[base])
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "checkpoint-6")
    expected = adapter_state(run.model)
    assert all(torch.equal(x.to(expected[n].dtype), expected[n]) for n, x in adapter_state(loaded).items())
    assert worst(loaded) < tolerance


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_resuming(tmp_path, checkpoint, mode, accumulation):
    """A run that was interrupted between projections and resumed ends bit for bit where the other does."""
    options = {"save_steps": 2, "gradient_accumulation_steps": accumulation}
    whole = trainer(checkpoint, tmp_path / "whole", config=config_for(mode), **options)
    whole.train()
    resumed = trainer(checkpoint, tmp_path / "resumed", config=config_for(mode), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = adapter_state(whole.model), adapter_state(resumed.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[n]) for n, x in found.items())
    assert (worst(resumed.model) < TOLERANCE) == (mode != "none")
    if mode == "periodic":
        assert {x.item() for n, x in found.items() if n.endswith("steps")} == {6}


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_learning_rates(tmp_path, checkpoint, how):
    """Each half has its own, and the scheduler scales both; a rate of zero leaves a half where it was."""
    if how == "optimizers":
        model = get_peft_model(
            tf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), config_for("always")
        )
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, weight_decay=0.1)
        optimizer = joint_optimizer(model, args, lora_lr=0.0, steer_lr=0.02)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
        run = trainer(checkpoint, tmp_path, model=model, trainer_options={"optimizers": (optimizer, None)})
    else:
        choice = (JointOptimizer, {"lora_lr": 0.0, "steer_lr": 0.02})
        run = trainer(
            checkpoint, tmp_path, config=config_for("always"), trainer_options={"optimizer_cls_and_kwargs": choice}
        )
    before = adapter_state(run.model)
    run.train()
    for name, x in adapter_state(run.model).items():
        assert torch.equal(x, before[name]) == (".steering." not in name), name
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [0.0, pytest.approx(0.0)]
    seen = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert len(seen) == 6
    assert run.lr_scheduler.base_lrs == [0.0, 0.02]


def test_learning_rates_need_both_halves(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="The steering half has no parameters"):
        joint_optimizer(get_peft_model(make(), LoraConfig(target_modules="all-linear")), args, 1e-3, 1e-3)
    galore = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, optim="lomo")
    with pytest.raises((ValueError, ImportError)):
        joint_optimizer(joint(), galore, 1e-3, 1e-3)


# --- several processes


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """Overlaps after each step and the saved state, by mode and kind of parallelism."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    out = tmp_path_factory.mktemp("distributed") / "out.pt"
    torch.multiprocessing.spawn(two_processes.train, args=(address, MODES, str(out)), nprocs=2)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes(trained_by_two, mode, kind):
    """Two processes with half a batch each train the adapter that one with the whole batch does."""
    overlaps, state = trained_by_two[mode, kind]
    model = two_processes.model(MODES[mode])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = inputs(rows=4)
    for step, found in enumerate(overlaps, 1):
        model(**x, labels=x["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (found < TOLERANCE) == (mode == "always" or (mode == "periodic" and step % 2 == 0))
    expected = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(state[name], p, rtol=1e-3, atol=1e-4)


def test_flattened_parameters_are_refused():
    """What DeepSpeed and FSDP1 make of `W_down`; their optimizers would update something else."""
    model = joint(orthogonal="periodic", orthogonal_interval=1).train()
    edit = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"]
    edit.W_down._hp_mapping = None
    with pytest.raises(RuntimeError, match="Use DDP or FSDP2, or `orthogonal='always'`"):
        model(**inputs())


# --- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steer_r": 0}, "`steer_r=0` must be an integer of at least 1"),
        ({"steer_kind": "cubic"}, "`steer_kind='cubic'` is unknown"),
        ({"steer_site": "head"}, "`steer_site='head'` is unknown; choose one of 'block', 'mlp', 'attention'"),
        (
            {"steer_kind": "linear", "steer_activation": "silu"},
            "`steer_activation='silu'` contradicts `steer_kind='linear'`",
        ),
        ({"steer_rank_pattern": {"x": 0}}, r"`steer_rank_pattern\['x'\]=0`"),
        ({"steer_layers_pattern": "h"}, "`steer_layers_pattern` needs `steer_layers_to_transform`"),
        (
            {"orthogonal": "sometimes"},
            "`orthogonal='sometimes'` is unknown; choose one of 'always', 'periodic', 'none'",
        ),
        ({"orthogonal": "periodic"}, "`orthogonal_interval=None` contradicts `orthogonal='periodic'`"),
        ({"orthogonal_interval": 5}, "`orthogonal_interval=5` contradicts `orthogonal=None`"),
        ({"orthogonal": "periodic", "orthogonal_interval": 0}, "`orthogonal_interval=0` must be an integer"),
        ({"orthogonal": "always", "steer_kind": "vector"}, "`orthogonal='always'` contradicts `steer_kind='vector'`"),
        ({"orthogonal": "always", "steer_kind": "loreft"}, "`orthogonal='always'` contradicts `steer_kind='loreft'`"),
        ({"orthogonal": "always", "steer_site": "attention"}, "contradicts `steer_site='attention'`"),
        ({"orthogonal": "always", "target_parameters": ["x"]}, "contradicts `target_parameters"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "`alora_invocation_tokens` cannot be combined"),
        ({"megatron_config": {}}, "`megatron_config` cannot be combined"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        JointSteerLoraConfig(**config)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {"target_modules": ["q_proj"]}, "LoRA does not target 'model.layers.0.mlp.down_proj'"),
        ("llama", {"layers_to_transform": [0], "target_modules": ["down_proj"]}, "cannot be kept at 'model.layers.1'"),
        ("gemma2", {}, "no single linear layer returns the output of 'model.layers.0.post_feedforward_layernorm'"),
        ("mixtral", {}, "no single linear layer returns the output of"),
        ("qwen3_moe", {}, "no single linear layer returns the output of"),
        ("llama", {"steer_layers_to_transform": [7]}, r"`steer_layers_to_transform` asks for \[7\]"),
        ("llama", {"steer_r": 40}, "`steer_r=40` at 'model.layers.0' is larger than the hidden size 32"),
    ],
)
def test_bad_injection(architecture, config, message):
    """Refused before anything is put into the model."""
    model = make(architecture)
    names = [name for name, _ in model.named_modules()]
    config = JointSteerLoraConfig(**{"target_modules": "all-linear", "orthogonal": "always", **config})
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("architecture", ["gemma2", "mixtral"])
def test_without_a_constraint_every_architecture_works(architecture):
    model = joint(architecture, orthogonal="none")
    randomize(model, std=0.3)
    assert not torch.allclose(logits(model, architecture), logits(make(architecture), architecture))


def test_the_default_constrains_where_lora_writes(caplog):
    model = joint(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2])
    assert list(orthogonality(model)) == ["model.layers.0", "model.layers.2"]
    assert "1 of 3 steered blocks" in caplog.text
    caplog.clear()
    joint()
    assert caplog.text == ""


def test_unknown_adapter():
    with pytest.raises(ValueError, match=r"`adapter_name='typo'`: the model has the joint adapters \['default'\]"):
        orthogonality(joint(), "typo")
    with pytest.raises(ValueError, match="No edit of adapter 'default' can be projected"):
        project_(joint(steer_kind="vector"))
    with pytest.raises(ValueError, match="`adapter_names=\\['typo'\\]`"):
        joint().merge_lora_and_unload(adapter_names=["typo"])
    with pytest.raises(ValueError, match="cannot be combined into one"):
        joint().add_weighted_adapter(["default"], [1.0], "sum")


def test_every_architecture_has_a_place():
    """Every architecture either has the layer or says that it has not: none is passed over."""
    found = {}
    for architecture in ARCHITECTURES:
        model = joint(architecture, task_type=None)
        found[architecture] = len(orthogonality(model)) == len(steer_layers(model.get_base_model()))
    assert {a for a, complete in found.items() if not complete} == {"gemma2", "gemma3", "mixtral", "qwen3_moe"}
