"""What every intervention is: an equation for `dh`, and how it is added to a hidden state.

Notation (arXiv 2603.00425, section 3): a hidden state `h` of width `d` is replaced by `h + scale * dh`. Every
intervention is called as `edit(h, scale)` and returns the steered state; `edit.delta(h)` is the bare equation for
`dh`. Parameters may have another floating dtype than `h`: they are cast to `h`'s on use, never the other way round, so
no copy of `h` is made.
"""

import torch

from .precision import KeepsPrecision
from .prepared import Prepared, Tensors, can_be_watched, reads_what_is_kept


class Intervention(KeepsPrecision):
    """Base class: `delta(h)` is the equation; `forward` adds it to `h`.

    Subclasses implement `delta`, `reset_parameters` and, where there is something to gain, `edit` for training, and
    `prepare` and `infer` for inference.
    """

    _prepared: Prepared | None = None

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        """`dh`, broadcastable to `h` of shape `(..., d)` and in its dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta(h).")

    def forward(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """`h + scale * dh`, shape `(..., d)`, in the dtype of `h`."""
        if torch.is_autocast_enabled(h.device.type):  # it would return another dtype than the base model expects
            with torch.autocast(h.device.type, enabled=False):
                return self.forward(h, scale)
        sources = self.sources()
        if torch.is_grad_enabled() and (h.requires_grad or any(x.requires_grad for x in sources)):
            return self.edit(h, scale)
        if self.training or not reads_what_is_kept(h):
            return self.edit(h, scale)
        key = (h.dtype, h.device, scale)
        prepared = self._prepared
        if prepared is None or not prepared.is_of(key, sources):
            if not all(can_be_watched(x, h.device) for x in sources):
                return self.edit(h, scale)
            with torch.no_grad():
                prepared = self._prepared = Prepared(key, sources, self.prepare(h.dtype, scale))
        return self.infer(h, prepared.tensors, scale)

    def edit(self, h: torch.Tensor, scale: float) -> torch.Tensor:
        """What `forward` returns, made from the parameters; differentiable."""
        return torch.add(h, self.delta(h), alpha=scale)

    def prepare(self, dtype: torch.dtype, scale: float) -> Tensors:
        """What `infer` needs, for hidden states of that dtype."""
        return ()

    def infer(self, h: torch.Tensor, prepared: Tensors, scale: float) -> torch.Tensor:
        """What `forward` returns, made from what is prepared, in as few kernels as there are products."""
        return self.edit(h, scale)

    def sources(self) -> list[torch.Tensor]:
        """The tensors that the edit is made of."""
        return [x for x in (*self._parameters.values(), *self._buffers.values()) if x is not None]

    def train(self, mode: bool = True):
        self._prepared = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._prepared = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:  # for copies and files
        return {name: x for name, x in self.__dict__.items() if name != "_prepared"}

    def acting_parameters(self) -> int:
        """How many of the trained parameters have an effect."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def affine(self) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """`(M, v)` with `dh = M h + v`, shapes `(d, d)` and `(d,)` in float32 or float64 (None stands for zero), or
        None if the edit is no affine function of `h`."""
        return None


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
