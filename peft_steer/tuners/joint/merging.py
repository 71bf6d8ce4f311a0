"""Merging the LoRA half of joint adapters, and keeping the steering half."""

from typing import TYPE_CHECKING, cast

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from ..steer.layer import SteerLayer
from .layer import JointSteerLayer
from .projection import JointLowRank


if TYPE_CHECKING:
    from .model import JointSteerLoraModel


def keep_steering(
    tuner: "JointSteerLoraModel", adapter_names: list[str], progressbar: bool = False, safe_merge: bool = False
) -> PeftModel:
    """The base with the LoRA half of these adapters merged, and a [`SteerConfig`] adapter with the other half of each.
    `tuner` has neither afterwards."""
    configs = {name: tuner.configs[name] for name in adapter_names}
    layers = {key: m for key, m in tuner.model.named_modules() if isinstance(m, JointSteerLayer)}
    training = tuner.training
    tuner.set_halves("both")
    strengths = {(key, name): m.strength(name) for key, m in layers.items() for name in adapter_names if m.edits(name)}
    for layer in layers.values():
        for edit in (edit for name in adapter_names for edit in layer.edits(name).values()):
            if isinstance(edit, JointLowRank) and edit.acts:
                edit.project_()
        layer.detach()
    base = tuner.merge_and_unload(progressbar, safe_merge, adapter_names)

    steering = {name: config.steer_config() for name, config in configs.items()}
    for name, steer in steering.items():
        steer.modules_to_save = configs[name].modules_to_save
    first, *others = adapter_names
    model = cast(PeftModel, get_peft_model(cast(PreTrainedModel, base), steering[first], first))
    for name in others:
        model.add_adapter(name, steering[name])
    targets = {key: m for key, m in base.named_modules() if isinstance(m, SteerLayer)}
    for key, layer in layers.items():
        for name in adapter_names:
            for part, edit in layer.edits(name).items():
                _take_over(targets[key].edits(name)[part], edit)
                targets[key].scaling[name] = strengths[key, name]
    cast(BaseTuner, model.base_model).set_adapter(adapter_names)
    return model.train(training)


def _take_over(edit: nn.Module, trained: nn.Module) -> None:
    """Give `edit` the parameters of `trained`, in their precision."""
    state = dict(trained.named_parameters())
    for name, p in list(edit.named_parameters()):
        setattr(edit, name, nn.Parameter(state[name].detach().clone(), requires_grad=p.requires_grad))
