"""What a joint adapter reads stays orthogonal to what LoRA writes: the projection, the model, the optimizer step."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from joint_models import MODES, TOLERANCE, by_qr, joint, train, worst
from peft.tuners.lora import LoraLayer
from tiny import adapter_state, inputs, make, randomize, reference_delta, steer_layers

from peft_steer import orthogonality
from peft_steer.tuners.joint.projection import overlap, project, projected


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


def test_flattened_parameters_are_refused():
    """What DeepSpeed and FSDP1 make of `W_down`; their optimizers would update something else."""
    model = joint(orthogonal="periodic", orthogonal_interval=1).train()
    edit = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"]
    edit.W_down._hp_mapping = None
    with pytest.raises(RuntimeError, match="Use DDP or FSDP2, or `orthogonal='always'`"):
        model(**inputs())
