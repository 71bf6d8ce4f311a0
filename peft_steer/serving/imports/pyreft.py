"""A folder that pyreft saved: `config.json` and a file of tensors for each intervention.

With the letters of `peft_steer/interventions/reft.py`, and `f` the activation:

| pyreft | its tensors | ours |
|---|---|---|
| LoReFT: `h + R^T (f(W h + b) - R h)` | `weight`, `bias`, `rotate_layer` (`R^T`) | `W`, `b`, `V = R`; no `f` |
| DiReFT: `h + R^T f(W h + b)` | `learned_source.*`, `rotate_layer.parametrizations.*` | `W`, `b`, `V = R` |
| NoReFT: `h + W2^T (f(W1 h + b1) - W2 h - b2)` | `learned_source.*`, `proj_layer.*` | `b = b1 - b2` |
| NoDiReFT: `h + W2^T f(W1 h + b1)` | the same | `b = b1` |

Which tokens are edited, and `f`, are in no file: they are arguments of pyreft's training.
"""

import json
import re
from pathlib import Path

import torch
from torch import nn

from .foreign import Foreign
from .tensors import load_tensors


KINDS = {"Loreft": "loreft", "Direft": "direft", "Noreft": "noreft", "Nodireft": "nodireft"}
_COMPONENTS = {"block_output": "block", "mlp_output": "mlp", "attention_output": "attention"}
# Of a path instead of a component: `model.layers[3].output`
_ENDINGS = {"": "block", ".mlp": "mlp", ".self_attn": "attention"}
_KEY = re.compile(
    r"(?:layer[_.](?P<layer>\d+)[_.])?comp[_.](?P<component>.+?)[_.]unit[_.](?P<unit>\w+?)[_.]nunit.*#(?P<part>\d+)"
)
_PATH = re.compile(r".*\[(\d+)\](.*)\.output")


def is_pyreft(folder: Path) -> bool:
    """Whether `folder` has a configuration of pyvene's, on which pyreft stands."""
    config = folder / "config.json"
    return config.is_file() and "intervention_types" in json.loads(config.read_text())


def read_pyreft(folder: Path, positions: str | None, activation: str | None) -> Foreign:
    """Reads a folder of pyreft.

    Args:
        folder: The folder.
        positions: Which tokens, as in `SteerConfig` (and in pyreft's scripts): `"f7+l7"`.
        activation: `f`, or `"none"`.

    Raises:
        ValueError: If it has an intervention that is not one of ours, or one of the two is not given.
    """
    if positions is None or activation is None:
        name = "positions" if positions is None else "activation"
        raise ValueError(f"--{name}: pyreft's files do not say it; give what the adapter was trained with")
    config = json.loads((folder / "config.json").read_text())
    kind = _kind_of(folder, config["intervention_types"])
    f = None if activation == "none" else activation
    if kind == "loreft" and f:
        raise ValueError(f"--activation {f}: LoReFT has none here, as in its paper; pyreft's `act_fn` is an addition")
    parts: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    sites = set()
    for key in config["sorted_keys"]:
        block, site, part = _place(folder, key)
        sites.add(site)
        parts[block, part] = _state(folder / f"intkey_{key}.bin", kind, f)
    if len(sites) > 1:
        raise ValueError(f"{folder}: edits at {' and '.join(sorted(sites))}; import one place at a time")
    blocks = {block for block, _ in parts}
    numbers = {part for _, part in parts}
    if numbers not in ({0}, {0, 1}) or len(parts) != len(blocks) * len(numbers):
        raise ValueError(
            f"{folder}: every block needs one edit, or one for first and one for last tokens; {config['sorted_keys']}"
        )
    tied = numbers == {0}
    states = {
        block: parts[block, 0]
        if tied
        else {
            f"{name}.{key}": x
            for name, part in (("prefix", 0), ("suffix", 1))
            for key, x in parts[block, part].items()
        }
        for block in sorted(blocks)
    }
    return Foreign(kind, states, sites.pop(), positions, f, tied)


def _kind_of(folder: Path, types: list[str]) -> str:
    names = {re.sub(r"Intervention$", "", name.strip("<>'").rpartition(".")[2]) for name in types}
    if len(names) != 1 or not names <= KINDS.keys():
        raise ValueError(
            f"{folder}: interventions {', '.join(sorted(names))}; one of {', '.join(KINDS)} can be imported. (A "
            "LobireftIntervention is a fixed vector, `R^T b`: save it as one.)"
        )
    return KINDS[names.pop()]


def _place(folder: Path, key: str) -> tuple[int, str, int]:
    """Block, site and number of an intervention, from its key."""
    match = _KEY.fullmatch(key)
    if match is None or match["unit"] != "pos":
        raise ValueError(f"{folder}: the key {key!r} is not pyreft's, of interventions at positions")
    component, layer = match["component"], match["layer"]
    path = _PATH.fullmatch(component)
    if path and path[2] in _ENDINGS:
        return int(path[1]), _ENDINGS[path[2]], int(match["part"])
    if component not in _COMPONENTS or layer is None:
        raise ValueError(
            f"{folder}: the component {component!r} is not one of our sites; known: {', '.join(_COMPONENTS)}"
        )
    return int(layer), _COMPONENTS[component], int(match["part"])


def _state(path: Path, kind: str, f: str | None) -> dict[str, torch.Tensor]:
    """The parameters of our intervention."""
    tensors = load_tensors(path)
    try:
        if kind == "loreft":
            return {"W": tensors["weight"], "b": tensors["bias"], "V": tensors["rotate_layer"].t()}
        W1 = tensors["learned_source.weight"]
        b1 = tensors.get("learned_source.bias", W1.new_zeros(len(W1)))
        if kind == "direft":
            return {"W": W1, "b": b1, "V": _rotation(tensors).t()}
        W2 = tensors["proj_layer.weight"]
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing, there are {', '.join(tensors)}") from error
    b2 = tensors.get("proj_layer.bias", b1.new_zeros(()))
    if kind == "noreft" and f and b2.any():
        raise ValueError(f"{path}: proj_layer.bias is not zero, and with f={f!r} no intervention here has such a bias")
    # in float32: the tensors are bfloat16 by default
    return {"W1": W1, "W2": W2, "b": b1.float() - b2.float() if kind == "noreft" else b1}


def _rotation(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`R^T`, `(d, r)`, of which torch's orthogonal parametrization has saved its own variables."""
    prefix = "rotate_layer."
    saved = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    layer = nn.Module()
    layer.weight = nn.Parameter(nn.init.orthogonal_(torch.empty_like(saved["parametrizations.weight.original"])))
    nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict(saved)
    return layer.weight.detach()
