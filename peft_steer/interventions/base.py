"""What every intervention is: an equation for `dh`, and how it is added to a hidden state.

Notation (arXiv 2603.00425, section 3): a hidden state `h` of width `d` is replaced by `h + scale * dh`. Every
intervention is called as `edit(h, scale)` and returns the steered state; `edit.delta(h)` is the bare equation for
`dh`. Parameters may have another floating dtype than `h`: they are cast to `h`'s on use, never the other way round, so
no copy of `h` is made.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch

from .low_rank_form import LowRankForm
from .options import Option
from .precision import KeepsPrecision
from .prepared import Prepared, Tensors, can_be_watched, reads_what_is_kept


Device = torch.device | str | None
Dtype = torch.dtype | None
Affine = tuple[torch.Tensor | None, torch.Tensor | None] | None  # `(M, v)` of `dh = M h + v`


class EditConfig(Protocol):
    """What every kind reads of a configuration; a kind's own fields are its `options`."""

    kind: str
    activation: str | None
    use_bias: bool
    init_weights: bool


class Intervention(KeepsPrecision):
    """Base class: `delta(h)` is the equation; `forward` adds it to `h`.

    Subclasses implement `delta`, `reset_parameters` and, where there is something to gain, `edit` for training, and
    `prepare` and `infer` for inference. What else is particular to a kind it declares in the attributes below:
    configuration, injection and files ask the class.

    Attributes:
        has_rank: Whether the edit has a rank `r`.
        activations: Names of the activations that may be chosen.
        default_activation: The one that is taken if none is chosen; None for the identity.
        has_bias: Whether `use_bias` may be set.
        edits_heads: Whether it edits attention heads, so that its site can only be `"heads"`.
        options: Fields of the configuration that this kind has and others do not.
    """

    has_rank: ClassVar[bool] = True
    activations: ClassVar[tuple[str, ...]] = ()
    default_activation: ClassVar[str | None] = None
    has_bias: ClassVar[bool] = False
    edits_heads: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Option]] = {}
    _prepared: Prepared | None = None

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raise `ValueError` if a configuration of this kind is wrong in a way that the declarations do not show."""

    @classmethod
    def check_heads(cls, config: Any, total: int) -> None:
        """Raise `ValueError` if the targeted blocks, with `total` heads, have too few."""

    @classmethod
    def before_saving(cls, config: Any, tensors: dict[str, torch.Tensor]) -> None:
        """An adapter of this kind is about to be saved, with these tensors."""

    @classmethod
    def arguments(cls, config: Any) -> dict[str, Any]:
        """What the constructor takes from the configuration, beside the sizes and `init_weights`."""
        return {"activation": config.activation} if cls.activations else {}

    @classmethod
    def build(
        cls,
        config: EditConfig,
        width: int,
        rank: int,
        head_dim: int | None = None,
        group: Any = None,
        **kwargs: Any,
    ) -> "Intervention":
        """The edit that a configuration of this kind asks for.

        Args:
            config: The configuration.
            width: Width `d` of the hidden states.
            rank: Rank `r` of the edit.
            head_dim: Width of a head, where the hidden states are heads side by side.
            group: Stands for the adapter, to the edits that are trained together.
            kwargs: `device` and `dtype` of the parameters.
        """
        sizes = (width, rank) if cls.has_rank else (width,)
        return cls(*sizes, init_weights=config.init_weights, **cls.arguments(config), **kwargs)

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        """`dh`, broadcastable to `h` of shape `(..., d)` and in its dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta(h).")

    if TYPE_CHECKING:

        def __call__(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor: ...

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

    def train(self, mode: bool = True) -> Self:
        self._prepared = None
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._prepared = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # for copies and files
        return {name: x for name, x in self.__dict__.items() if name != "_prepared"}

    def acting_parameters(self) -> int:
        """How many of the trained parameters have an effect."""
        return _trainable(self)

    @staticmethod
    def outlook(edits: list[Any]) -> str | None:
        """A sentence if `edits`, those of one adapter, will train fewer parameters later in the training."""
        return None

    def affine(self) -> Affine:
        """`(M, v)` with `dh = M h + v`, shapes `(d, d)` and `(d,)` in float32 or float64 (None stands for zero), or
        None if the edit is not an affine function of `h`."""
        return None

    def low_rank(self, scale: float = 1.0) -> LowRankForm | None:
        """The edit with `scale * dh` in the form that engines run, or None if it has none (edits of heads)."""
        return None


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _trained(model: torch.nn.Module) -> list[Intervention]:
    edits = (module for module in model.modules() if isinstance(module, Intervention))
    return [edit for edit in edits if _trainable(edit)]


def idle_parameters(model: torch.nn.Module) -> int:
    """Number of trained parameters of `model` that have no effect: what a method did not choose (LoFiT)."""
    return sum(_trainable(edit) - edit.acting_parameters() for edit in _trained(model))


def acting_parameters(model: torch.nn.Module) -> int:
    """Number of trained parameters of `model` that have an effect."""
    return _trainable(model) - idle_parameters(model)


def outlooks(model: torch.nn.Module) -> list[str]:
    """What is to be said about the number of parameters that will be trained later, for each adapter."""
    adapters: dict[Any, list[Intervention]] = {}
    for edit in _trained(model):
        adapters.setdefault(getattr(edit, "group", edit), []).append(edit)
    return [line for edits in adapters.values() if (line := edits[0].outlook(edits))]
