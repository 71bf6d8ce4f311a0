"""An optimizer with the learning rates that LoRA and steering each need."""

from collections.abc import Callable
from typing import Any

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .layer import CONTAINER


class JointOptimizer:
    """An optimizer with a learning rate for each half of a joint adapter, for any trainer that takes
    `optimizer_cls_and_kwargs` (transformers' and TRL's; with FSDP2 as well, and with `peft_config=`, where the adapter
    does not exist before the trainer):
    `SFTTrainer(..., optimizer_cls_and_kwargs=(JointOptimizer, {"lora_lr": 2e-4, "steer_lr": 2e-3}))`. The scheduler
    that the trainer's arguments name then scales both rates. The paper searched 5e-5 to 1.5e-3 for LoRA, 5e-4 to 5e-3
    for steering.

    It makes an [`~torch.optim.AdamW`], or another `optimizer_cls`; further arguments are passed on to that. Without a
    trainer, `JointOptimizer()(model, lora_lr=2e-4, steer_lr=2e-3)` is the optimizer.
    """

    def __call__(
        self,
        model: nn.Module,
        lora_lr: float,
        steer_lr: float,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer_cls: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **kwargs: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer.

        Args:
            model: the model with its joint adapter, already on its device.
            lora_lr: learning rate of the LoRA half.
            steer_lr: learning rate of the steering half.
            lr: learning rate of what else is trained (`modules_to_save`).

        Raises:
            ValueError: if one of the halves has nothing to train.
        """
        return optimizer_cls(_groups(model, weight_decay, lora_lr, steer_lr, lr), lr=lr, **kwargs)

    @classmethod
    def as_in(
        cls, args: TrainingArguments, model: PreTrainedModel, lora_lr: float, steer_lr: float
    ) -> tuple[type["JointOptimizer"], dict[str, Any]]:
        """The value of `optimizer_cls_and_kwargs` with the optimizer, and its settings, that `args` names.

        Raises:
            ValueError: if `args.optim` names an optimizer that takes the whole model.
        """
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not isinstance(optimizer_cls, type) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            raise ValueError(
                f"`optim={args.optim!r}` makes its own groups of parameters; choose another, such as 'adamw_torch'."
            )
        rates = {"lora_lr": lora_lr, "steer_lr": steer_lr, "weight_decay": args.weight_decay}
        return cls, {**kwargs, **rates, "optimizer_cls": optimizer_cls}


def _groups(model: nn.Module, weight_decay: float, lora_lr: float, steer_lr: float, lr: float) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {
        "lora": {"params": [], "lr": lora_lr, "weight_decay": weight_decay},
        "steering": {"params": [], "lr": steer_lr, "weight_decay": weight_decay},
        "other": {"params": [], "lr": lr, "weight_decay": weight_decay},
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            half = "steering" if f".{CONTAINER}." in name else "lora" if ".lora_" in name else "other"
            groups[half]["params"].append(p)
    for half in ("lora", "steering"):
        if not groups[half]["params"]:
            raise ValueError(f"The {half} half has no parameters that require gradients: is it a joint adapter?")
    return [group for group in groups.values() if group["params"]]


def _refuse_lorafa(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """LoRA-FA takes every two parameters with "lora" in their names for an `A` that is frozen and its `B`."""
    if not isinstance(optimizer, LoraFAOptimizer):
        return
    steering = [name for group in optimizer.param_groups for name in group["names"] if f".{CONTAINER}." in name]
    if steering:
        raise RuntimeError(
            f"LoRA-FA cannot train joint adapters: it would take {steering[0]!r} for a matrix of LoRA's. Use "
            "`JointOptimizer`, or another optimizer."
        )


register_optimizer_step_pre_hook(_refuse_lorafa)
