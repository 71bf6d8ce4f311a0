"""The steering half at one site, and the LoRA layer whose output it must not read."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_steer.interventions import Intervention
from peft_steer.interventions.optimizer_hooks import Group
from peft_steer.sites import Block, Site, output_linear, site_module

from ..steer.config import SteerConfig
from ..steer.injection import Plan
from ..steer.layer import SteerLayer
from .config import JointSteerLoraConfig
from .projection import JointLowRank


logger = logging.getLogger(__name__)
CONTAINER = "lora_steer_edit"


@dataclass(frozen=True)
class JointPlan:
    """Where the halves of one adapter meet; see [`Plan`].

    Attributes:
        steering: Where the edits are put.
        writers: Names of the linear layers whose LoRA must not be read, by the name of the steered module.
        where: Device and dtype of the edits, by that name, as they were before LoRA was put in.
    """

    steering: Plan
    writers: dict[str, str]
    where: dict[str, tuple[torch.device, torch.dtype]]


class JointSteerLayer(SteerLayer):
    """[`SteerLayer`] of a joint adapter.

    Its edits are in a container that has LoRA's prefix, so that whatever goes by that prefix (transformers' renaming
    of keys, TRL's filters) takes in the steering half too.
    """

    adapter_layer_names = (CONTAINER,)

    muted = False  # see `JointSteerLoraModel.set_halves`
    # A LoRA layer of each adapter, with its scaling as configured; in tuples: not submodules.
    _leads: Mapping[str, tuple[LoraLayer, float]] = MappingProxyType({})

    @property
    def steer_edit(self) -> nn.ModuleDict:  # type: ignore[override]  # the base has a submodule of this name
        return cast(nn.ModuleDict, self._modules[CONTAINER])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.muted:
            self.edited = []
            return hidden_states
        return super().forward(hidden_states)

    # --- strength: one number for both halves, and LoRA's layers have it. PEFT's helpers know those alone:
    # `rescale_adapter_scale` and others replace their `scaling`. What they write into this layer's (hot-swapping, for
    # every module that has one) counts for nothing.

    def follow(self, adapter_name: str, lora: LoraLayer) -> None:
        """From now on an adapter's edits are as strong, relative to their configuration, as its LoRA in `lora`."""
        self._leads = {**self._leads, adapter_name: (lora, float(lora.scaling[adapter_name]))}

    def strength(self, adapter_name: str) -> float:
        lora, configured = self._leads[adapter_name]
        now = lora.scaling.get(adapter_name, configured)
        return self.initial_scaling[adapter_name] * (now / configured if configured else 1.0)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """LoRA's layers have it, as for the next two."""

    def scale_layer(self, scale: float) -> None: ...

    def unscale_layer(self, scale: float | None = None) -> None: ...

    def build_edit(
        self,
        config: SteerConfig,
        site: Site,
        group: Group | None = None,
        *,
        constraint: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Intervention:
        """As [`SteerLayer`]'s; with `constraint`, the arguments of [`JointLowRank`], one whose `W_down` knows the LoRA
        that it must not read."""
        if constraint is None:
            return super().build_edit(config, site, group, **kwargs)
        return JointLowRank.build(config, site.width, site.rank, **constraint, **kwargs)


def plan_writers(
    sites: Mapping[str, Site], config: JointSteerLoraConfig, is_targeted: Callable[[str], bool]
) -> dict[str, str]:
    """Names of the linear layers that end the steered blocks' MLPs and get LoRA, by the name of the steered module.

    Args:
        sites: by the name of the steered module.
        config: the configuration of the adapter.
        is_targeted: whether LoRA will be put at the module of that name.

    Raises:
        ValueError: if `config.orthogonal` asks for a constraint and a block has no such layer.
    """
    writers, missing = {}, {}
    for name, site in sites.items():
        linear, reason = _mlp_output(site.block)
        if linear is not None and is_targeted(linear):
            writers[name] = linear
        else:
            missing[name] = reason or f"LoRA does not target {linear!r}, the linear layer that ends the MLP"
    if not missing or not config.constrained:
        return writers
    name, reason = next(iter(missing.items()))
    if config.orthogonal is not None:
        raise ValueError(
            f"`orthogonal={config.orthogonal!r}` cannot be kept at {name!r}: {reason}. Target that layer with LoRA, "
            "steer other blocks (`steer_layers_to_transform`), or set `orthogonal='none'`."
        )
    logger.warning(
        "%d of %d steered blocks have no orthogonality constraint; in %r, %s. Set `orthogonal='none'` if it is meant.",
        len(missing),
        len(sites),
        name,
        reason,
    )
    return writers


def _mlp_output(block: Block) -> tuple[str | None, str | None]:
    """The name of the linear layer that ends the block's MLP, or why there is none."""
    try:
        name, module = site_module(block, "mlp")
    except ValueError as error:
        return None, str(error).partition(". ")[0]
    inner = output_linear(module)
    if inner is None:
        return None, f"no single linear layer returns the output of {name!r} ({type(module).__name__})"
    return (f"{name}.{inner}" if inner else name), None
