"""An edit's parameters keep the precision they were given, whatever a trainer does to `parameter.data`."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn


class KeepsPrecision(nn.Module):
    """A module whose own parameters are not narrowed behind its back.

    On 4-bit and 8-bit bases TRL (1.16) runs `p.data = p.data.to(torch.bfloat16)` over everything trainable, after
    PEFT has put adapters into float32 and before it makes the optimizer. In bfloat16 a step below 2^-9 of a value
    rounds away, and fixed vectors, trained with small steps on values near 1, stop moving.

    Such a cast is undone, bit for bit, the next time that anything uses the module as a module: lists its parameters
    (DDP and FSDP2 do, when they wrap it), sets its mode (trainers do, before every step), moves it, loads or saves it.
    It costs no memory: what is kept is a second reference to the same storage, until somebody replaces it.

    What goes through the module is a wish and is respected: `.to(torch.bfloat16)`, `.half()`, and an adapter that was
    created in half precision (`autocast_adapter_dtype=False`).
    """

    def keep_precision(self) -> None:
        """Undo narrowing casts; from here on, the parameters are kept as they are now."""
        if torch.is_inference_mode_enabled():
            return
        for p in self._parameters.values():
            if type(p) is not nn.Parameter or p.is_meta:  # nothing, or sharded, or not here
                continue
            kept = p.__dict__.get("_kept")
            if kept is not None and _is_cast_of(p, kept):
                p.data = kept
            elif kept is None or kept.data_ptr() != p.data_ptr() or kept.dtype != p.dtype:
                p.__dict__["_kept"] = p.data

    def accept_precision(self) -> None:
        """Keep the parameters as they are now, narrowed or not."""
        for p in self._parameters.values():
            if p is not None:
                p.__dict__.pop("_kept", None)
        self.keep_precision()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self.keep_precision()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.keep_precision()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.accept_precision()
        return self

    def train(self, mode: bool = True) -> Self:
        self.keep_precision()
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self.keep_precision()
        return super().named_parameters(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.keep_precision()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.keep_precision()
        super()._load_from_state_dict(*args, **kwargs)
        self.keep_precision()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, whose parameters are new ones
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self.accept_precision()


def _is_cast_of(p: torch.Tensor, kept: torch.Tensor) -> bool:
    narrower = p.dtype != kept.dtype and torch.promote_types(p.dtype, kept.dtype) == kept.dtype
    return narrower and p.device == kept.device and p.shape == kept.shape and torch.equal(p.data, kept.to(p.dtype))
