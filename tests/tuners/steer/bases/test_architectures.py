"""Every architecture: what is steered, what the steered model computes, and that nothing else changes."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import (
    ARCHITECTURES,
    DECODERS,
    HEAD_KINDS,
    KINDS,
    METHODS,
    METHODS_AT_SITES,
    REFT,
    SITES,
    STACKS,
    inputs,
    make,
    randomize,
    reference_delta,
    steer_layers,
)

from peft_steer import SteerConfig


@pytest.mark.parametrize(("method", "site"), METHODS_AT_SITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identity_at_the_start(method, architecture, site):
    """Bit-equal logits for every kind; exactly one layer for every text block."""
    x = inputs(architecture)
    base = make(architecture)(**x).logits
    for name, kind in (KINDS | (HEAD_KINDS if site == "heads" else {})).items():
        if name in REFT and architecture != "llama":
            continue
        model = get_peft_model(make(architecture), METHODS[method](**{"site": site, "r": 4, **kind})).eval()
        assert torch.equal(model(**x).logits, base)
        layers = list(steer_layers(model.get_base_model()))
        stacks = STACKS.get(architecture, ["model.layers"])
        assert len(layers) == 3 * len(stacks)
        for stack in stacks:
            for i in range(3):
                assert sum(layer.startswith(f"{stack}.{i}.") or layer == f"{stack}.{i}" for layer in layers) == 1


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((a, kind) for a in ARCHITECTURES for kind in ("silu", "loreft", "linear_bias")), *(("llama", k) for k in REFT)],
)
@pytest.mark.parametrize("site", SITES)
def test_the_model_computes_the_equation(architecture, site, kind):
    """Each steered module's output is what the block (or the skip connection) receives plus the equation, and nothing
    else differs: the base model with a plain hook that adds the reference gives the same logits."""
    x = inputs(architecture)
    model = get_peft_model(make(architecture), SteerConfig(site=site, r=4, scale=0.5, **KINDS[kind])).eval()
    randomize(model, std=1.0)
    edits = {name: layer.steer_edit["default"] for name, layer in steer_layers(model.get_base_model()).items()}
    base = make(architecture)
    plain = base(**x).logits

    def add(edit, at_input=False):
        def hook(module, args, output=None):
            if at_input:
                return ((args[0].double() + 0.5 * reference_delta(edit, args[0])).to(args[0].dtype),)
            h = output[0] if isinstance(output, tuple) else output
            steered = (h.double() + 0.5 * reference_delta(edit, h)).to(h.dtype)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return hook

    for name, edit in edits.items():
        module = base.get_submodule(name)
        if site == "heads":
            module.register_forward_pre_hook(add(edit, at_input=True))
        else:
            module.register_forward_hook(add(edit))
    expected = base(**x).logits
    torch.testing.assert_close(model(**x).logits, expected, rtol=1e-3, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**x).logits, plain)


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("bert", "t5", "opt")])
def test_the_site_is_what_is_added_to_the_skip_connection(architecture, site):
    """A constant added at the last block's MLP or attention arrives at the block's output as it is: at the MLP in
    full; at the attention in full where the MLP does not see it, so there the MLP is silenced."""
    model = make(architecture)
    x, v = inputs(architecture), torch.randn(32, generator=torch.Generator().manual_seed(3))
    stack = STACKS.get(architecture, ["model.layers"])[0]
    block = model.get_submodule(f"{stack}.2")
    if site == "attention":  # the block adds nothing after the attention
        silent = get_peft_model(model, SteerConfig(site="mlp", kind="vector", layers_to_transform=2)).get_base_model()
        (name,) = steer_layers(silent)
        silent.get_submodule(name).steering.detach()
        silent.get_submodule(name).register_forward_hook(
            lambda m, a, out: torch.zeros_like(out) if isinstance(out, torch.Tensor) else (0 * out[0], *out[1:])
        )
        model = silent
    outputs = []
    block.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    model(**x)
    steered = get_peft_model(model, SteerConfig(site=site, kind="vector", layers_to_transform=2)).eval()
    (layer,) = steer_layers(steered).values()
    layer.steer_edit["default"].v.data.copy_(v)
    steered(**x)
    torch.testing.assert_close(outputs[1] - outputs[0], v.expand_as(outputs[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_changes_the_adapter_alone(method, architecture):
    model = make(architecture)
    before = copy.deepcopy(model.state_dict())
    model = get_peft_model(model, METHODS[method](kind="nonlinear", r=4)).train()
    randomize(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = inputs(architecture)
    labels = x["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**({"input_ids": x["input_ids"]} if architecture == "t5" else x), labels=labels).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        steering = ".default." in name
        assert p.requires_grad == steering, name
        unused = "vision" in name or "projector" in name  # there is no image
        assert torch.equal(p, start[name]) != (steering and not unused), name
    after = model.unload().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt", "bert"])
def test_hidden_states_are_what_the_blocks_receive(method, architecture):
    base = make(architecture)
    base(**inputs(architecture), output_hidden_states=True)  # installs the capture before the edit
    model = get_peft_model(base, METHODS[method](kind="linear", r=4)).eval()
    randomize(model)
    received = []
    stack = model.get_base_model().get_submodule(STACKS.get(architecture, ["model.layers"])[0])
    for block in stack:
        block.register_forward_pre_hook(
            lambda m, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    hidden_states = model(**inputs(architecture), output_hidden_states=True).hidden_states
    assert len(received) == 3
    for found, expected in zip(hidden_states, received, strict=False):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("method", "site"), METHODS_AT_SITES)
@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_generation(method, architecture, site):
    """Greedy generation with a cache equals repeated full forwards; a left-padded row equals the row alone."""
    model = get_peft_model(make(architecture), METHODS[method](site=site, kind="nonlinear", r=4)).eval()
    randomize(model)
    x = inputs(architecture)["input_ids"]
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(x)
    generated = model.generate(input_ids=x, attention_mask=mask, **greedy)
    slow = model.generate(input_ids=x, attention_mask=mask, use_cache=False, **greedy)
    assert torch.equal(generated, slow)
    if architecture == "t5":
        return
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extra = (
        {} if architecture in ("opt", "bloom") else {"position_ids": positions}
    )  # those derive positions from the mask
    found = model(input_ids=padded, attention_mask=mask, **extra).logits[:, 3:]
    torch.testing.assert_close(found, model(input_ids=x).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("architecture", DECODERS)
def test_gradients_stop_at_the_lowest_steered_block(architecture, site):
    """Nothing below it is differentiated or kept."""
    model = get_peft_model(make(architecture), SteerConfig(site=site, r=4, layers_to_transform=[2])).train()
    stack = model.get_base_model().get_submodule(STACKS.get(architecture, ["model.layers"])[0])
    grad_needed, kept = [], []
    for block in stack:
        block.register_forward_hook(
            lambda m, args, out: grad_needed.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    stack[2].register_forward_pre_hook(lambda m, args: kept.append("last block"))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(**inputs(architecture))
    assert grad_needed == [False, False, True]
    assert kept.index("last block") == 0


@pytest.mark.parametrize(("method", "site"), METHODS_AT_SITES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_gradient_checkpointing(method, architecture, site, reentrant):
    x = inputs(architecture)
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(make(architecture), METHODS[method](site=site, kind="nonlinear", r=4)).train()
        randomize(model)
        torch.manual_seed(0)  # dropout
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**x, labels=x["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
