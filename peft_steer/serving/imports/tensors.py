"""Files of tensors: hotwire's and EasySteer's `.pt`, steering-vectors' saved state, safetensors. Nothing is unpickled.

| in the file | what it is |
|---|---|
| a tensor `(blocks, d)`, or a dictionary with that alone | hotwire: row `i` is added to the output of block `i` |
| `{block: tensor (d,)}` | steering-vectors' `layer_activations`, repeng's `directions` |
| `{"layer_activations": ..., "layer_type": ...}` | the fields of steering-vectors' `SteeringVector` |
| a tensor `(d,)` | EasySteer; at which blocks is in no file, so it has to be said |
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .foreign import Foreign, vectors


SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# steering-vectors' names of places, as far as they are ours
_SITES = {"decoder_block": "block", "self_attn": "attention", "mlp": "mlp"}


def load_tensors(path: Path) -> Any:
    """What `torch.save` or safetensors wrote, if it is tensors, numbers, strings, lists and dictionaries.

    Raises:
        ValueError: If it is something else: loading it would run the file's code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path}: it is damaged, or no file of tensors by torch.save: anything else is not loaded, since that "
                "would run code of the file"
            ) from error
        raise ValueError(
            f"{path}: it holds more than tensors, {found[1]}, and loading that would run code of the file. If you "
            "trust it, save its tensors first; of a SteeringVector: "
            '`torch.save({"layer_activations": v.layer_activations, "layer_type": v.layer_type}, FILE)`.'
        ) from error
    # What torch raises for a file that is no pickle at all depends on its first bytes.
    except (SafetensorError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: it is damaged, or no file of tensors ({type(error).__name__})") from error


def read_tensors(path: Path, site: str | None, layers: list[int] | None) -> Foreign:
    """Reads a file of vectors.

    Args:
        path: The file.
        site: Where they are added, if the file does not say: `"block"`, `"mlp"` or `"attention"`; by default
            `"block"`.
        layers: The blocks, if the file does not say.

    Raises:
        ValueError: If the file holds no vectors, or something has to be said that was not, or the other way round.
    """
    content = load_tensors(path)
    if isinstance(content, dict) and "layer_activations" in content:
        kind = content.get("layer_type", "decoder_block")
        if kind not in _SITES:
            raise ValueError(f"{path}: layer_type={kind!r} is a place that SteerConfig has no site for")
        if site not in (None, _SITES[kind]):
            raise ValueError(f"--site {site}: the file says layer_type={kind!r}, which is {_SITES[kind]!r}")
        content, site = content["layer_activations"], _SITES[kind]
    elif (
        isinstance(content, dict)
        and len(content) == 1
        and isinstance(next(iter(content)), str)
        and _is_tensor(next(iter(content.values())), ndim=2)
    ):
        content = next(iter(content.values()))
    site = site or "block"
    if isinstance(content, dict):
        if layers is not None:
            raise ValueError("--layers: the file says itself which blocks its vectors are for")
        return vectors(_by_block(path, content), site)
    if _is_tensor(content, ndim=2) and content.shape[0] == 1:
        content = content[0]
    if _is_tensor(content, ndim=1):
        if layers is None:
            raise ValueError(f"{path}: one vector, and no file says for which blocks; name them with --layers")
        return vectors(dict.fromkeys(layers, content), site)
    if _is_tensor(content, ndim=2):
        rows = list(range(len(content))) if layers is None else layers
        if len(rows) != len(content):
            raise ValueError(f"--layers names {len(rows)} blocks, and {path} has {len(content)} rows")
        given = {block: v for block, v in zip(rows, content, strict=True) if v.any()}  # a row of zeros steers nothing
        if not given:
            raise ValueError(f"{path}: all rows are zero")
        return vectors(given, site)
    raise ValueError(f"{path}: no steering vectors: {_shape(content)}")


def _by_block(path: Path, content: dict) -> dict[int, torch.Tensor]:
    by_block = {}
    for key, v in content.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{path}: {key!r} is not the number of a block; {_shape(content)}")
        v = v.squeeze() if isinstance(v, torch.Tensor) else v
        if not _is_tensor(v, ndim=1):
            raise ValueError(f"{path}: block {number} has no vector: {_shape(v)}")
        by_block[number] = v
    if not by_block:
        raise ValueError(f"{path}: it is empty")
    return by_block


def _is_tensor(x: Any, ndim: int) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim == ndim and x.is_floating_point()


def _shape(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor {tuple(x.shape)}, {x.dtype}"
    return f"a dictionary of {', '.join(map(repr, list(x)[:3]))}, ..." if isinstance(x, dict) else type(x).__name__
