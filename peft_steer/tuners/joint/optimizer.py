"""An optimizer with the learning rates that LoRA and steering each need."""

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .layer import CONTAINER


def joint_optimizer(
    model: nn.Module, args: TrainingArguments, lora_lr: float, steer_lr: float
) -> torch.optim.Optimizer:
    """The optimizer that `args` names, with a learning rate for each half of a joint adapter. Any trainer takes it as
    it is: `SFTTrainer(model, args, optimizers=(joint_optimizer(model, args, lora_lr=2e-4, steer_lr=2e-3), None))`. The
    scheduler that `args` names then scales both. (Not under FSDP, where trainers accept no optimizer from outside: see
    [`JointOptimizer`].)

    Args:
        model: the model with its joint adapter, already on its device.
        args: the trainer's arguments; what else is trained (`modules_to_save`) gets their `learning_rate`.
        lora_lr: learning rate of the LoRA half.
        steer_lr: learning rate of the steering half. The paper searched 5e-5 to 1.5e-3 for LoRA, 5e-4 to 5e-3 for
            steering.

    Raises:
        ValueError: if one of the halves has nothing to train, or `args.optim` names an optimizer that takes the whole
            model.
    """
    factory, kwargs = joint_optimizer_cls_and_kwargs(model, args, lora_lr, steer_lr)
    return factory()(model, **kwargs)


def joint_optimizer_cls_and_kwargs(
    model: nn.Module, args: TrainingArguments, lora_lr: float, steer_lr: float
) -> tuple[type["JointOptimizer"], dict]:
    """What [`joint_optimizer`] makes, for a trainer that will make it: the value of `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: if `args.optim` names an optimizer that takes the whole model.
    """
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not isinstance(optimizer_cls, type) or {"params", "model", "optimizer_dict"} & kwargs.keys():
        raise ValueError(
            f"`optim={args.optim!r}` makes its own groups of parameters; choose another, such as 'adamw_torch'."
        )
    rates = {"lora_lr": lora_lr, "steer_lr": steer_lr, "weight_decay": args.weight_decay}
    return JointOptimizer, {**kwargs, **rates, "optimizer_cls": optimizer_cls}


class JointOptimizer:
    """The same for trainers that make the optimizer themselves and take `optimizer_cls_and_kwargs` (`Trainer`,
    `SFTTrainer`; with FSDP2 as well, and with `peft_config=`, where the adapter does not exist before the trainer):
    `SFTTrainer(..., optimizer_cls_and_kwargs=(JointOptimizer, {"lora_lr": 2e-4, "steer_lr": 2e-3}))`.

    It makes an [`~torch.optim.AdamW`], or another `optimizer_cls`; further arguments are passed on to that.
    """

    def __call__(
        self,
        model: nn.Module,
        lora_lr: float,
        steer_lr: float,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **kwargs,
    ) -> torch.optim.Optimizer:
        return optimizer_cls(_groups(model, weight_decay, lora_lr, steer_lr, lr), lr=lr, **kwargs)


def _groups(model: nn.Module, weight_decay: float, lora_lr: float, steer_lr: float, lr: float) -> list[dict]:
    groups = {
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
