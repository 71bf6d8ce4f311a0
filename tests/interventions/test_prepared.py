"""What inference prepares and keeps: as few kernels as products, and nothing stale, whoever changes a weight."""

import copy
import io

import pytest
import torch
from joint_models import MODES, joint
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import HEAD_KINDS, KINDS, adapted, inputs, make, randomize, reference_delta, steer_layers

from peft_steer import SteerConfig
from peft_steer.cost.kernels import CountKernels, kernels_of_a_token
from peft_steer.interventions import prepared


ALL = {**KINDS, **HEAD_KINDS, "noreft_silu": {"kind": "noreft", "activation": "silu"}}
# LoReFT keeps R and W - R, the bias is a column, heads keep 1 + A; each in the dtype of the base
DTYPES = [torch.float32, torch.bfloat16]
PRODUCTS = {
    "vector": 1,
    "linear": 2,
    "linear_bias": 2,
    "silu": 3,
    "relu": 3,
    "gelu": 3,
    "tanh": 3,
    "loreft": 2,
    "noreft": 2,
    "noreft_silu": 4,
    "direft": 2,
    "direft_tanh": 3,
    "nodireft": 2,
    "nodireft_relu": 3,
    "lofit": 1,
    "jola": 1,
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ALL)
def test_kernels_that_an_edit_adds_to_a_block(kind, dtype, scale):
    """As many as its equation has products (and activations), in eval mode, for one token."""
    model = adapted(dtype=dtype, scale=scale, **ALL[kind])
    assert kernels_of_a_token(model) - kernels_of_a_token(make(dtype=dtype)) == 3 * PRODUCTS[kind]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_a_joint_adapter(dtype, mode):
    """Those of LoRA, and three."""
    lora = get_peft_model(make(dtype=dtype), LoraConfig(r=4, target_modules="all-linear"))
    model = joint(dtype=dtype, **MODES[mode])
    randomize(model)
    assert kernels_of_a_token(model) - kernels_of_a_token(lora.eval()) == 3 * 3


def test_the_count_sees_what_is_not_prepared():
    """The control: in training mode LoReFT computes `R` at every pass."""
    model = adapted(kind="loreft").train()
    x = {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    with torch.no_grad(), CountKernels() as count:
        model(**x)
    assert count.counts["linalg_cholesky_ex"] == 3


# --- nothing stale


def edit_of(model):
    return next(iter(steer_layers(model).values())).steer_edit["default"]


def other_values(edit):
    """Values for every trained parameter, far from the present ones."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
        for name, p in edit._parameters.items()
        if p is not None
    }


def copy_without_gradient(edit, values):
    with torch.no_grad():
        for name, x in values.items():
            getattr(edit, name).copy_(x)


def through_data(edit, values):
    for name, x in values.items():
        getattr(edit, name).data.copy_(x)


def one_entry_through_data(edit, values):
    for name in values:
        getattr(edit, name).data.view(-1)[0] += 3.0


def replace_data(edit, values):
    for name, x in values.items():
        getattr(edit, name).data = x.clone()


def replace_data_again_and_again(edit, values):
    for factor in (3.0, 2.0, 1.0):  # memory that was freed is used again
        for name, x in values.items():
            getattr(edit, name).data = factor * x
        edit(torch.randn(2, edit_width(edit)))


def new_parameters(edit, values):
    for name, x in values.items():
        setattr(edit, name, torch.nn.Parameter(x.clone()))


def inference_mode(edit, values):
    with torch.inference_mode():
        for name, x in values.items():
            getattr(edit, name).copy_(x)


def inference_tensors(edit, values):
    """Parameters that have no version at all."""
    with torch.inference_mode():
        for name, x in values.items():
            setattr(edit, name, torch.nn.Parameter(2.0 * x + 1.0, requires_grad=False))
        edit(torch.randn(2, edit_width(edit)))
        for name, x in values.items():
            getattr(edit, name).copy_(x)


def load(edit, values):
    edit.load_state_dict({**edit.state_dict(), **values})


def load_and_assign(edit, values):
    edit.load_state_dict({**edit.state_dict(), **values}, assign=True)


def an_optimizer(edit, values):
    for p in edit.parameters():
        p.requires_grad_(True).grad = torch.ones_like(p)
    torch.optim.AdamW(edit.parameters(), lr=0.3, fused=True).step()
    edit.requires_grad_(False)


def through_numpy(edit, values):
    for name, x in values.items():
        getattr(edit, name).detach().numpy()[...] = x.numpy()


def to_double_and_back(edit, values):
    edit.double()
    copy_without_gradient(edit, values)
    edit.float()


def swap(edit, values):
    for name, x in values.items():
        torch.utils.swap_tensors(getattr(edit, name), torch.nn.Parameter(x.clone()))


WAYS = [copy_without_gradient, through_data, one_entry_through_data, replace_data, replace_data_again_and_again]
WAYS += [new_parameters, inference_mode, inference_tensors, load, load_and_assign, an_optimizer, through_numpy]
WAYS += [to_double_and_back, swap]


def edit_width(edit):
    return 32


# what an accelerator cannot see, and what there is none of
ON_A_CPU = [through_data, one_entry_through_data, through_numpy]


@pytest.mark.parametrize(
    ("way", "device"),
    [(way, device) for device in ("cpu", "accelerator") for way in WAYS if device == "cpu" or way not in ON_A_CPU],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ALL)
def test_a_change_is_seen_at_once(kind, dtype, way, device, monkeypatch):
    """The edit before and after is the equation of the parameters that it has then; also where bytes are not
    compared, as on an accelerator."""
    monkeypatch.setattr(prepared, "_bytes_are_near", lambda _: device == "cpu")
    edit = edit_of(adapted(kind=ALL[kind]["kind"], **{k: v for k, v in ALL[kind].items() if k != "kind"}))
    edit.requires_grad_(False)
    h = torch.randn(3, 32, dtype=dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    outs = []
    for change in (None, way):
        if change is not None:
            edit(h, 0.5)
            change(edit, other_values(edit))
        with torch.no_grad():
            outs.append(edit(h, 0.5))
            want = h.double() + 0.5 * reference_delta(edit, h)
        torch.testing.assert_close(outs[-1].double(), want, **tolerance)
        with torch.inference_mode():
            assert torch.equal(edit(h, 0.5), outs[-1])
    assert (outs[0].double() - outs[1].double()).abs().max() > 0.05


@pytest.mark.parametrize("way", [through_data, one_entry_through_data])
def test_a_write_into_data_on_an_accelerator_needs_the_mode(way, monkeypatch):
    monkeypatch.setattr(prepared, "_bytes_are_near", lambda _: False)
    edit = edit_of(adapted(kind="loreft")).requires_grad_(False)
    h = torch.randn(3, 32)
    edit(h)
    way(edit, other_values(edit))
    edit.eval()
    torch.testing.assert_close(edit(h).double(), h.double() + reference_delta(edit, h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "loreft", "lofit", "linear_bias"])
def test_strength_dtype_and_mode(kind):
    model = adapted(**ALL[kind])
    edit = edit_of(model).requires_grad_(False)
    for dtype, scale in [(torch.float32, 1.0), (torch.float32, -2.0), (torch.bfloat16, 1.0), (torch.float32, 1.0)]:
        h = torch.randn(3, 32).to(dtype)
        for mode in (False, True, False):
            edit.train(mode)
            want = h.double() + scale * reference_delta(edit, h)
            torch.testing.assert_close(edit(h, scale).double(), want, rtol=0.02, atol=0.1 * (dtype == torch.bfloat16))
    model.eval()
    before = model(**inputs()).logits
    model.set_scale("default", 0.0)
    torch.testing.assert_close(model(**inputs()).logits, make()(**inputs()).logits)
    model.set_scale("default", 1.0)
    assert torch.equal(model(**inputs()).logits, before)


@pytest.mark.parametrize("mode", ["always", "periodic"])
@pytest.mark.parametrize("half", ["lora_B", "W_down"])
def test_the_projection_follows_both_halves(mode, half):
    model = joint(**MODES[mode])
    randomize(model)
    with torch.no_grad():
        model(**inputs())
        for name, p in model.named_parameters():
            if half in name:
                p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
        fresh = copy.deepcopy(model)
        assert torch.equal(model(**inputs()).logits, fresh(**inputs()).logits)


@pytest.mark.parametrize("kind", ["loreft", "jola", "silu"])
def test_copies_and_files_have_nothing_of_it(kind):
    model = adapted(**ALL[kind])
    plain, used = io.BytesIO(), io.BytesIO()
    torch.save(model, plain)
    with torch.no_grad():
        before = model(**inputs()).logits
    torch.save(model, used)
    assert abs(len(used.getvalue()) - len(plain.getvalue())) < 2000
    other = copy.deepcopy(model)
    randomize(other, std=1.0, seed=7)
    with torch.no_grad():
        assert not torch.equal(other(**inputs()).logits, before)
        assert torch.equal(model(**inputs()).logits, before)
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
        assert torch.equal(model(**inputs()).logits, other(**inputs()).logits)


@pytest.mark.parametrize("kind", ["vector", "linear_bias", "loreft", "jola"])
def test_compiled(kind):
    """Without graph breaks, before and after a change of the weights."""
    model = adapted(**ALL[kind]).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in (1, 2):
            randomize(model, std=0.5, seed=seed)
            torch.testing.assert_close(compiled(**inputs()).logits, model(**inputs()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ALL)
def test_the_start_is_exact(kind, dtype):
    """dh = 0 stays the base, bit for bit, through the prepared products as well."""
    model = get_peft_model(make(dtype=dtype), SteerConfig(r=4, **ALL[kind])).eval()
    with torch.no_grad():
        want = make(dtype=dtype)(**inputs()).logits
        assert torch.equal(model(**inputs()).logits, want)
        model.to(dtype)
        assert torch.equal(model(**inputs()).logits, want)
