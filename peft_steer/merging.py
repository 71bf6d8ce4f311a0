"""When an edit can be folded into the base's weights exactly, and the linear layer that it is folded into."""

from types import MethodType

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SteerConfig
from .injection import resolve_sites
from .layer import SteerLayer
from .sites import Block, adds_mlp_unchanged, output_linear, site_module


def plan_merge(
    model: nn.Module, configs: dict[str, SteerConfig], adapter_names: list[str] | None = None
) -> list[tuple[SteerLayer, nn.Module, list[str]]]:
    """The layers to merge, each with the linear layer that takes its edits and the names of the adapters.

    A fixed vector, and a linear or LoReFT edit of an MLP's or attention's output, is an affine function of what one linear layer
    returns, unless a norm stands between them. Nothing else is, and a merge that changed nothing would be worse than none:
    generation from "merged" weights would come from the base model.

    Args:
        model: the model that holds the layers.
        configs: the configuration of each adapter.
        adapter_names: the adapters to merge; by default the active ones.

    Raises:
        ValueError: if a merge would not be exact; says why, and what to do instead.
    """
    plan = []
    blocks: dict[str, dict[str, Block]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SteerLayer):
            continue
        site_name = name.rpartition(".")[0]
        names = [n for n in check_adapters_to_merge(layer, adapter_names) if n in layer.steer_edit]
        if not names:
            continue
        for adapter in names:
            if adapter not in blocks:
                blocks[adapter] = resolve_sites(model, configs[adapter])[0]
            linear = _linear_for(configs[adapter], site_name, blocks[adapter][site_name], layer)
        left_out = set(layer.active_adapters) & set(layer.steer_edit) - set(names) - set(layer.merged_adapters)
        if left_out:
            raise ValueError(
                f"The adapters {sorted(left_out)} are active but would not be merged, and would stop acting. Merge all active "
                "adapters together, or deactivate the others with `set_adapter`."
            )
        plan.append((layer, linear, names))
    _check_one_edit_per_linear(model, plan)
    return plan


def _linear_for(config: SteerConfig, site_name: str, block: Block, layer: SteerLayer) -> nn.Module:
    def refuse(reason: str):
        raise ValueError(
            f"The adapter at {site_name!r} (site={config.site!r}, kind={config.kind!r}) cannot be merged: {reason}. Keep it "
            "unmerged: `PeftModel.from_pretrained` runs it at nearly the base model's speed, and `unload()` removes it."
        )

    if config.kind == "nonlinear":
        refuse("a nonlinear edit equals no change of a weight")
    if config.site == "block" and config.kind != "vector":
        refuse("it reads the skip connection, which is no linear layer's output")
    if config.site == "block" and not adds_mlp_unchanged(block):
        refuse("the block normalizes or scales the MLP's output")
    name, module = site_module(block, "mlp" if config.site == "block" else config.site)
    if "norm" in name.rpartition(".")[2].lower():
        refuse(f"the norm {name!r} stands between the last linear layer and the edit")
    inner = output_linear(module)
    if inner is None:
        refuse(f"no single linear layer returns the output of {name!r} ({type(module).__name__})")
    linear = module.get_submodule(inner)
    plain = isinstance(linear, (nn.Linear, Conv1D)) and type(linear.weight) is nn.Parameter
    if not plain or not linear.weight.is_floating_point() or linear.weight.is_meta:
        refuse(f"the weight of {type(linear).__name__} is quantized, sharded, offloaded or adapted by another method")
    return linear


def _check_one_edit_per_linear(model: nn.Module, plan: list) -> None:
    taken = {id(m.merged_linear): m for m in model.modules() if isinstance(m, SteerLayer) and m.merged}
    for layer, linear, _ in plan:
        if taken.setdefault(id(linear), layer) is not layer:
            raise ValueError(
                "Two sites would be merged into the same linear layer (a vector at the block and an edit at its MLP). Merge one "
                "and keep the other as an adapter."
            )


def refuse_to_save(model: nn.Module) -> None:
    """Make `model.save_pretrained` raise: its configuration has no bias where merging had to add one, so `from_pretrained` would
    drop the bias, silently."""
    model.save_pretrained = MethodType(_save_refused, model)


def _save_refused(model, *args, **kwargs):
    raise ValueError(
        "This model cannot be saved with the adapter merged: merging gave a bias to linear layers that have none in "
        f"{type(model).__name__}'s configuration, and `from_pretrained` would drop it. Save the adapter instead (the PeftModel's "
        "`save_pretrained`, before merging), or use an edit without a constant part (kind='linear', use_bias=False)."
    )
