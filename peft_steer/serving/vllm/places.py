"""Where edits act in a model of vLLM: the modules, by the names that they have in transformers and in vLLM."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from peft_steer_vllm import ARCHITECTURES, CHECKPOINT_NAMES

from .private import rename


CHILD = "steering"
_BLOCK = re.compile(r"(?:^|\.)layers\.\d+$")


class Places:
    """The places of one model.

    Args:
        model: a model of vLLM whose architecture is in the table of `peft_steer_vllm.py`.
        architecture: its name there.
    """

    def __init__(self, model: nn.Module, architecture: str):
        self.convention, self.names = ARCHITECTURES[architecture]
        self.blocks = {name: m for name, m in model.named_modules() if _BLOCK.search(name)}
        self.model = model
        self._rename, self._in_checkpoints = rename(model), CHECKPOINT_NAMES.get(architecture, {})

    def checkpoint_name(self, name: str) -> str:
        """The name in checkpoints of what transformers calls `name`."""
        path, dot, last = name.rpartition(".")
        return path + dot + self._in_checkpoints.get(last, last)

    def name(self, name: str) -> str:
        """vLLM's name of what transformers calls `name`."""
        return self._rename(self.checkpoint_name(name))

    def of_site(self, site: str) -> Iterator[str]:
        """vLLM's names of all the places of a site."""
        for block in self.blocks:
            yield block if site == "block" else f"{block}.{self.names[site]}"

    def known(self) -> set[str]:
        """vLLM's names of all places."""
        return {name for site in ("block", *self.names) for name in self.of_site(site)}

    def put(self, name: str, edit: nn.Module) -> None:
        """Make `edit`, a module that maps `h` to `dh`, act at the place `name`."""
        module = self.model.get_submodule(name)
        module.add_module(CHILD, edit)
        # Not a hook: vLLM compiles the model and may call `forward` itself.
        module.__class__ = _steered(type(module), _FORWARDS[self.convention if name in self.blocks else "module"])


def _deferred(base: type[nn.Module]) -> Callable:
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, residual = base.forward(self, *args, **kwargs)
        h = out + residual
        return self.steering(h), h  # the next norm adds them, where transformers adds the edit

    return forward


def _full(base: type[nn.Module]) -> Callable:
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        h, rest = base.forward(self, *args, **kwargs)
        return h + self.steering(h), rest

    return forward


def _tensor(base: type[nn.Module]) -> Callable:
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        h = base.forward(self, *args, **kwargs)
        return h + self.steering(h)

    return forward


def _module(base: type[nn.Module]) -> Callable:
    """Of a module inside a block, which returns a tensor or, if it is a linear layer, its bias beside it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.forward(self, *args, **kwargs)
        if isinstance(out, tuple):
            return (out[0] + self.steering(out[0]), *out[1:])
        return out + self.steering(out)

    return forward


_FORWARDS = {"deferred": _deferred, "full": _full, "tensor": _tensor, "module": _module}
_classes: dict[tuple[type, Callable], type] = {}


def _steered(base: type[nn.Module], make_forward: Callable) -> type:
    """The subclass of `base` that adds the edit, under the name of `base`: vLLM looks for the source of classes."""
    if (base, make_forward) not in _classes:
        members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": make_forward(base)}
        _classes[base, make_forward] = type(base.__name__, (base,), members)
    return _classes[base, make_forward]
