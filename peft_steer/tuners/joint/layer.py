"""The steering half at one site, and the LoRA layer whose output it must not read."""

import logging
from collections.abc import Callable

from peft.tuners.lora import LoraLayer
from torch import nn

from peft_steer.sites import Block, output_linear, site_module

from ..steer.layer import SteerLayer
from .config import JointSteerLoraConfig
from .projection import JointLowRank


logger = logging.getLogger(__name__)
CONTAINER = "lora_steer_edit"


class JointSteerLayer(SteerLayer):
    """[`SteerLayer`] of a joint adapter.

    Its edits are in a container that has LoRA's prefix, so that whatever goes by that prefix (transformers' renaming
    of keys, TRL's filters) takes in the steering half too.
    """

    adapter_layer_names = (CONTAINER,)

    muted = False  # see `JointSteerLoraModel.set_halves`

    @property
    def steer_edit(self) -> nn.ModuleDict:
        return getattr(self, CONTAINER)

    def forward(self, hidden_states):
        if self.muted:
            self.edited = []
            return hidden_states
        return super().forward(hidden_states)

    def update_layer(
        self, adapter_name: str, config: JointSteerLoraConfig, r: int, device, dtype, lora: LoraLayer | None
    ) -> None:
        """Add the adapter `adapter_name`; `lora` is the layer whose output is not to be read, if there is one."""
        steer = config.steer_config()
        super().update_layer(adapter_name, steer, r, device, dtype)
        if lora is not None and config.steer_kind in ("linear", "nonlinear"):
            self.steer_edit[adapter_name] = JointLowRank(
                self.out_features,
                r,
                activation=steer.activation,
                use_bias=steer.use_bias,
                init_weights=steer.init_weights,
                device=device,
                dtype=dtype,
                lora=lora,
                adapter_name=adapter_name,
                orthogonal=(config.orthogonal or "always") if config.constrained else "none",
                interval=config.orthogonal_interval,
            )


def plan_writers(
    sites: dict[str, Block], config: JointSteerLoraConfig, is_targeted: Callable[[str], bool]
) -> dict[str, str]:
    """Names of the linear layers that end the steered blocks' MLPs and get LoRA, by the name of the steered module.

    Args:
        sites: the blocks, by the name of the steered module.
        config: the configuration of the adapter.
        is_targeted: whether LoRA will be put at the module of that name.

    Raises:
        ValueError: if `config.orthogonal` asks for a constraint and a block has no such layer.
    """
    writers, missing = {}, {}
    for name, block in sites.items():
        linear, reason = _mlp_output(block)
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
    """The name of the linear layer that ends the block's MLP, or the reason that there is none."""
    try:
        name, module = site_module(block, "mlp")
    except ValueError as error:
        return None, str(error).partition(". ")[0]
    inner = output_linear(module)
    if inner is None:
        return None, f"no single linear layer returns the output of {name!r} ({type(module).__name__})"
    return (f"{name}.{inner}" if inner else name), None
