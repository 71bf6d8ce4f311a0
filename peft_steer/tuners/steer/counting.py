"""How many parameters an adapter has that act."""

from torch import nn

from peft_steer.interventions.base import Intervention


def acting_parameters(model: nn.Module) -> int:
    """Number of trained parameters of `model` that have an effect: fewer than PEFT counts where a method has chosen
    among them (LoFiT trains every head first and then a few)."""
    edits = [module for module in model.modules() if isinstance(module, Intervention)]
    idle = sum(
        sum(p.numel() for p in edit.parameters()) - edit.acting_parameters()
        for edit in edits
        if any(p.requires_grad for p in edit.parameters())
    )
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - idle
