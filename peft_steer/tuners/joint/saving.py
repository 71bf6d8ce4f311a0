"""What is saved satisfies the constraint; and the public functions that measure and restore it."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .layer import JointSteerLayer
from .projection import JointLowRank, projected


def orthogonality(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Overlap of what each edit of a joint adapter reads with what LoRA writes at the end of the block's MLP.

    Args:
        model: a model with a joint adapter, wrapped or not.
        adapter_name: the name of the adapter.

    Returns:
        By the name of the steered module, the largest `|W_i . B_j| / (|W_i| |B_j|)` over the rows of `W_down` and the
        columns of `lora_B`: between 0 (orthogonal, or `lora_B` still zero) and 1. Without the blocks in which LoRA
        does not write there.

    Raises:
        ValueError: if there is no such adapter.
    """
    return {name: edit.overlap() for name, edit in _edits(model, adapter_name).items()}


def project_(model: nn.Module, adapter_name: str = "default") -> None:
    """Project `W_down` of a joint adapter in place, whatever its `orthogonal` says. What satisfies the constraint
    already stays as it is, bit for bit.

    Args:
        model: a model with a joint adapter, wrapped or not.
        adapter_name: the name of the adapter.

    Raises:
        ValueError: if there is no such adapter, or no edit of it that could be projected.
    """
    edits = _edits(model, adapter_name)
    if not edits:
        raise ValueError(
            f"No edit of adapter {adapter_name!r} can be projected: only those of kind 'linear' and 'nonlinear' in "
            "blocks whose MLP ends with a linear layer that LoRA targets."
        )
    for edit in edits.values():
        edit.project_()


def _edits(model: nn.Module, adapter_name: str) -> dict[str, JointLowRank]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, JointSteerLayer)}
    known = {adapter for layer in layers.values() for adapter in layer.steer_edit}
    if adapter_name not in known:
        raise ValueError(f"`adapter_name={adapter_name!r}`: the model has the joint adapters {sorted(known)}.")
    return {
        ".".join(filter(None, [name.rpartition(".")[0].removeprefix("base_model.model."), part])): edit
        for name, layer in layers.items()
        for part, edit in layer.edits(adapter_name).items()
        if isinstance(edit, JointLowRank)
    }


def project_for_saving(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state_dict` with every `W_down` projected. The weights in `model` stay: saving does not change training."""
    names = {id(m): name for name, m in model.named_modules()}
    state_dict = dict(state_dict)
    edits = [e for m in model.modules() if isinstance(m, JointSteerLayer) for e in m.edits(adapter_name).values()]
    for edit in edits:
        if not isinstance(edit, JointLowRank) or not edit.acts:
            continue
        W_name = _bare(f"{names[id(edit)]}.W_down")
        B_name = _bare(f"{names[id(edit.writer)]}.lora_B.{adapter_name}.weight")
        W, B = state_dict.get(W_name), state_dict.get(B_name)
        if W is None or B is None or W.is_meta or B.is_meta or isinstance(W, DTensor):
            continue  # a part of the state: of other adapters, of offloaded weights, of a sharded checkpoint
        state_dict[W_name] = projected(W, B)
    return state_dict


def _bare(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name
