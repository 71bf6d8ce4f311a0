"""Folders of pyreft: its files are written by its layout, and its equations give the imported adapter's logits."""

import json

import pytest
import torch
import torch.nn.functional as F
from command_line import peft_steer
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM


D, R = 32, 3
TOKENS = torch.arange(3, 30)[None]
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu}


def random(*shape, generator):
    return torch.randn(*shape, generator=generator)


def intervention(kind, seed, dtype=torch.bfloat16):
    """The tensors that pyreft saves, and its equation `dh(h, f)`."""
    g = torch.Generator().manual_seed(seed)
    W, b = random(R, D, generator=g).to(dtype), random(R, generator=g).to(dtype)
    if kind in ("Loreft", "Direft"):
        rotate = nn.Module()
        rotate.weight = nn.Parameter(torch.linalg.qr(random(D, R, generator=g))[0].contiguous())
        nn.utils.parametrizations.orthogonal(rotate)
        RT = rotate.weight.detach()
        if kind == "Loreft":
            state = {"weight": W, "bias": b, "rotate_layer": RT.clone()}
            return state, lambda h, f: (f(h @ W.float().T + b.float()) - h @ RT) @ RT.T
        state = {f"rotate_layer.{key}": x for key, x in rotate.state_dict().items()}
        state |= {"learned_source.weight": W, "learned_source.bias": b}
        return state, lambda h, f: f(h @ W.float().T + b.float()) @ RT.T
    W2, b2 = random(R, D, generator=g).to(dtype), random(R, generator=g).to(dtype)
    state = {"learned_source.weight": W, "learned_source.bias": b, "proj_layer.weight": W2, "proj_layer.bias": b2}
    W1, W2, b1, b2 = W.float(), W2.float(), b.float(), b2.float()
    if kind == "Noreft":
        return state, lambda h, f: (f(h @ W1.T + b1) - (h @ W2.T + b2)) @ W2
    return state, lambda h, f: f(h @ W1.T + b1) @ W2


def write(folder, kind, places, dots=False, kinds=None, change=None):
    """A folder as pyreft saves it; returns the equations by place."""
    folder.mkdir()
    keys, equations = [], {}
    for i, (block, component, part) in enumerate(places):
        key = f"layer_{block}_comp_{component}_unit_pos_nunit_1#{part}"
        if dots:
            key = f"layer.{block}.comp.{component}.unit.pos.nunit.1#{part}"
        if component.startswith("model."):
            key = f"comp_{component}_unit_pos_nunit_1#{part}"
        state, equations[block, part] = intervention(kind, seed=i)
        torch.save({**state, **(change or {})}, folder / f"intkey_{key}.bin")
        keys.append(key)
    types = [f"<class 'pyreft.interventions.{name}Intervention'>" for name in kinds or [kind] * len(keys)]
    representations = [[block, component, "pos", 1, R] for block, component, _ in places]
    config = {"representations": representations, "intervention_types": types, "sorted_keys": keys}
    (folder / "config.json").write_text(json.dumps(config))
    return equations


def run_pyreft(model_dir, equations, masks, f, place=""):
    """`h + dh(h)` at the output of the blocks, at the tokens of `masks[part]`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for block in {block for block, _ in equations}:
        module = model.model.layers[block].get_submodule(place)

        def hook(module, args, output, block=block):
            h = output[0] if isinstance(output, tuple) else output
            out = h.clone()
            for part, mask in masks.items():
                out[:, mask] = (h + equations[block, part](h, f))[:, mask]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        module.register_forward_hook(hook)
    with torch.no_grad():
        return model(TOKENS).logits


def imported(model_dir, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder).eval()
    lengths = {} if model.peft_config["default"].positions == "all" else {"prompt_lengths": [TOKENS.shape[1]]}
    with torch.no_grad():
        return model(TOKENS, **lengths).logits


def ends(first=0, last=0):
    mask = torch.zeros(TOKENS.shape[1], dtype=torch.bool)
    mask[:first] = True
    mask[len(mask) - last :] = True
    return mask


def check(model_dir, folder, expected):
    torch.testing.assert_close(imported(model_dir, folder), expected, atol=2e-5, rtol=0)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model_dir).eval()(TOKENS).logits
    assert (expected - base).abs().max() > 0.1  # the control


def run_import(model_dir, tmp_path, *flags):
    return peft_steer("import", tmp_path / "reft", "-o", tmp_path / "a", "--base", model_dir, *flags)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        *((kind, "none") for kind in ("Loreft", "Direft", "Noreft", "Nodireft")),
        *(("Direft", "gelu"), ("Direft", "tanh"), ("Nodireft", "relu")),
    ],
)
def test_equations(kind, activation, tiny_llama, tmp_path):
    equations = write(tmp_path / "reft", kind, [(0, "block_output", 0), (1, "block_output", 0)])
    assert run_import(tiny_llama, tmp_path, "--positions", "f2+l3", "--activation", activation) == 0
    f = ACTIVATIONS[activation]
    check(tiny_llama, tmp_path / "a", run_pyreft(tiny_llama, equations, {0: ends(2, 3)}, f))


@pytest.mark.parametrize("kind", ["Loreft", "Noreft"])
def test_edits_of_their_own_for_first_and_last(kind, tiny_llama, tmp_path):
    places = [(1, "block_output", 0), (1, "block_output", 1)]
    equations = write(tmp_path / "reft", kind, places)
    assert run_import(tiny_llama, tmp_path, "--positions", "f2+l3", "--activation", "none") == 0
    masks = {0: ends(first=2), 1: ends(last=3)}
    check(tiny_llama, tmp_path / "a", run_pyreft(tiny_llama, equations, masks, ACTIVATIONS["none"]))


@pytest.mark.parametrize(
    ("component", "dots", "place"),
    [
        ("mlp_output", False, "mlp"),
        ("block_output", True, ""),
        ("model.layers[1].output", False, ""),
        ("model.layers[1].mlp.output", False, "mlp"),
    ],
)
def test_places(component, dots, place, tiny_llama, tmp_path):
    equations = write(tmp_path / "reft", "Loreft", [(1, component, 0)], dots)
    assert run_import(tiny_llama, tmp_path, "--positions", "all", "--activation", "none") == 0
    check(tiny_llama, tmp_path / "a", run_pyreft(tiny_llama, equations, {0: ends(99)}, ACTIVATIONS["none"], place))


BLOCK = [(1, "block_output", 0)]


@pytest.mark.parametrize(
    ("made", "flags", "message"),
    [
        ({"kind": "Loreft"}, ["--activation", "none"], "--positions: pyreft's files do not say it"),
        ({"kind": "Loreft"}, ["--positions", "l1"], "--activation: pyreft's files do not say it"),
        ({"kind": "Loreft"}, ["--positions", "l1", "--activation", "relu"], "LoReFT has none here"),
        ({"kind": "Loreft", "kinds": ["Consreft"]}, [], "Consreft; one of"),
        ({"kind": "Loreft", "kinds": ["Loreft", "Direft"]}, [], "Direft, Loreft"),
        ({"kind": "Loreft", "places": [(1, "query_output", 0)]}, [], "'query_output' is not one of our sites"),
        ({"kind": "Loreft", "places": [(0, "block_output", 0), (1, "mlp_output", 0)]}, [], "one place at a time"),
        ({"kind": "Loreft", "places": [(0, "block_output", 0), (1, "block_output", 1)]}, [], "every block needs"),
        ({"kind": "Noreft"}, ["--positions", "l1", "--activation", "tanh"], "proj_layer.bias is not zero"),
        ({"kind": "Loreft", "places": [*BLOCK, (1, "block_output", 1)]}, ["--positions", "l1"], "share_weights"),
        ({"kind": "Loreft"}, ["--site", "mlp"], "says it itself"),
        ({"kind": "Direft", "change": {"learned_source.weight": torch.ones(R, 16)}}, [], "widths"),
    ],
)
def test_refused(made, flags, message, tiny_llama, tmp_path, capsys):
    write(tmp_path / "reft", **{"places": BLOCK, **made})
    asked = {"--positions": "f2+l2", "--activation": "none"}
    if not message.startswith("--"):
        flags = [*flags, *(word for name, value in asked.items() if name not in flags for word in (name, value))]
    assert run_import(tiny_llama, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
