"""How strong adapters act: `scale` times the configured factor, at one layer and on a whole model."""

from typing import Any

from torch import nn


class LayerStrength:
    """The strength of the adapters of one layer; the methods are named as in PEFT's LoRA layers."""

    scaling: dict[str, float]
    initial_scaling: dict[str, float]
    merged_adapters: list[str]
    active_adapters: list[str]

    def strength(self, adapter_name: str) -> float:
        """The factor of `dh` that acts now."""
        return self.scaling[adapter_name]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the factor of `dh` to `scale` times the configured one."""
        if adapter_name in self.scaling:
            self.check_not_merged("set_scale")
            self.scaling[adapter_name] = scale * self.initial_scaling[adapter_name]

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of every active adapter by `scale`."""
        self.check_not_merged("scale_layer")
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of every active adapter by `scale`, or return it to the configured one."""
        self.check_not_merged("unscale_layer")
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def check_not_merged(self, what: str) -> None:
        """Raise `ValueError` if adapters are merged, which `what` would not reach."""
        if self.merged_adapters:
            raise ValueError(
                f"`{what}` would not reach the merged adapters {self.merged_adapters}; unmerge them first."
            )


class Strength:
    """How strong adapters act, on a whole model; for a `BaseTuner` whose layers have methods of the same names."""

    model: nn.Module
    peft_config: dict[str, Any]
    tuner_layer_cls: Any

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the strength of an adapter to `scale` times the configured one: `h + scale * config.scale * dh`."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} does not exist; there are {list(self.peft_config)}.")
        for layer in self._scalable_layers("set_scale"):
            layer.set_scale(adapter_name, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`."""
        for layer in self._scalable_layers("scale_layer"):
            layer.scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or return it to the configured one."""
        for layer in self._scalable_layers("unscale_layer"):
            layer.unscale_layer(scale)

    def _tuner_layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _scalable_layers(self, what: str) -> list[Any]:
        layers = self._tuner_layers()
        for layer in layers:  # all of them, before the first is changed
            if isinstance(layer, LayerStrength):
                layer.check_not_merged(what)
        return layers
