"""When an edit can be folded into the base's weights exactly, and the linear layer that it is folded into."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_steer.sites import Site, output_linear, site_module

from ..config import SteerConfig
from ..injection import resolve_sites
from ..layer import CHILD, SteerLayer
from .folding import Linear


Alike = tuple[object, ...]  # what blocks that behave alike have in common
Step = tuple[SteerLayer, Linear, list[str]]  # a layer, the linear layer that takes its edits, names of adapters


def plan_merge(
    model: nn.Module,
    configs: dict[str, SteerConfig],
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
) -> list[Step]:
    """The layers to merge, each with the linear layer that takes its edits and the names of the adapters.

    A fixed vector, and any edit without an activation of an MLP's or attention's output, is an affine function of what
    one linear layer returns, unless a norm stands between them; at the heads, of what one reads. Nothing else is, and
    a merge that changed nothing would be worse than none: generation from "merged" weights would come from the base
    model.

    Args:
        model: the model that holds the layers.
        configs: the configuration of each adapter.
        adapter_names: the adapters to merge; by default the active ones.
        safe_merge: whether to check that their parameters are finite.

    Raises:
        ValueError: if a merge would not be exact; says why, and what to do instead.
    """
    unknown = set(adapter_names or ()) - set(configs)
    if unknown:
        raise ValueError(f"There are no adapters {sorted(unknown)} to merge; there are {list(configs)}.")
    plan: list[Step] = []
    sites: dict[str, dict[str, Site]] = {}
    tried: set[Alike] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, SteerLayer):
            continue
        names = [n for n in check_adapters_to_merge(layer, adapter_names) if n in layer.steer_edit]
        if not names:
            continue
        for adapter in names:
            # Before anything is made of the parameters: LoReFT's rows of NaN cannot be orthogonalized.
            if safe_merge and not all(p.isfinite().all() for p in layer.steer_edit[adapter].parameters()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if adapter not in sites:
                sites[adapter] = resolve_sites(model, configs[adapter])
            linear = _linear_for(
                model, configs[adapter], sites[adapter][name.rpartition(".")[0]], layer, adapter, tried
            )
        plan.append((layer, linear, names))
    _check_one_edit_per_linear(model, plan)
    return plan


def _linear_for(
    model: nn.Module, config: SteerConfig, site: Site, layer: SteerLayer, adapter_name: str, tried: set[Alike]
) -> Linear:
    def refuse(reason: str) -> NoReturn:
        raise ValueError(
            f"The adapter at {site.name!r} (site={site.place!r}, kind={config.kind!r}) cannot be merged: {reason}. "
            "Keep it unmerged: `PeftModel.from_pretrained` runs it at nearly the base model's speed, and `unload()` "
            "removes it."
        )

    if config.positions != "all":
        refuse(f"`positions={config.positions!r}` edits some tokens, a weight all of them")
    affine = layer.shared_edit(adapter_name).affine()
    if affine is None:
        refuse("no change of a weight equals a nonlinear edit")
    if site.place == "block" and affine[0] is not None:
        refuse("it reads the skip connection, which no linear layer returns")
    if site.place == "heads":
        return _plain(site.module, refuse)
    name, module = site_module(site.block, "mlp" if site.place == "block" else site.place)
    if "norm" in name.rpartition(".")[2].lower():
        refuse(f"the norm {name!r} stands between the last linear layer and the edit")
    reader = getattr(module, CHILD, None) if site.place == "block" else None
    if reader is not None and set(reader.active_adapters) & set(reader.steer_edit):
        refuse(f"the active adapters at {name!r} would read it as part of the MLP's output")
    inner = output_linear(module)
    if inner is None:
        refuse(f"no single linear layer returns the output of {name!r} ({type(module).__name__})")
    linear = _plain(module.get_submodule(inner), refuse)
    alike: Alike = (site.place, site.block.stack, type(site.block.module), type(module))
    if alike not in tried and not arrives_unchanged(model, linear, site.module):
        refuse(f"what {name!r} returns is normalized, scaled or otherwise changed before the place of the edit")
    tried.add(alike)
    return linear


def _plain(linear: nn.Module, refuse: Callable[[str], NoReturn]) -> Linear:
    """`linear`, if its weight can be changed."""
    if (
        isinstance(linear, (nn.Linear, Conv1D))
        and type(linear.weight) is nn.Parameter
        and linear.weight.is_floating_point()
        and not linear.weight.is_meta
    ):
        return linear
    refuse(f"the weight of {type(linear).__name__} is quantized, sharded, offloaded or adapted by another method")


@torch.no_grad()
def arrives_unchanged(model: nn.Module, source: nn.Module, steered: nn.Module) -> bool:
    """Whether something added to `source`'s output appears in `steered`'s output as it is: tried, on the model's
    dummy input, since no attribute tells a block that normalizes after the sum (BERT, BART) from one that does not."""
    dummy_inputs: Mapping[str, torch.Tensor] | None = getattr(model, "dummy_inputs", None)
    if dummy_inputs is None:
        raise ValueError(
            f"Whether merging is exact is tried on `dummy_inputs`, which {type(model).__name__} does not have; define "
            "it as transformers' models do (a dictionary of forward arguments)."
        )
    outputs: list[torch.Tensor] = []
    added: torch.Tensor | None = None

    def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output if added is None else output + added

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    modes = {module: module.training for module in model.modules()}
    layers = [m for m in modes if isinstance(m, SteerLayer) and not m.disable_adapters]
    handles = [source.register_forward_hook(add), steered.register_forward_hook(record)]
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True
        dummy = {name: x.to(next(source.parameters()).device) for name, x in dummy_inputs.items()}
        model(**dummy)
        added = outputs[0].std() * torch.linspace(-1, 1, outputs[0].shape[-1]).to(outputs[0])
        model(**dummy)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer._disable_adapters = False
        for module, mode in modes.items():
            module.training = mode
    moved = outputs[1].double() - outputs[0].double()
    tolerance = 1e-3 if outputs[0].dtype in (torch.float32, torch.float64) else 5e-2
    return bool((moved - added).norm() < tolerance * moved.norm())


def _check_one_edit_per_linear(model: nn.Module, plan: list[Step]) -> None:
    taken = {id(m.merged_linear): m for m in model.modules() if isinstance(m, SteerLayer) and m.merged}
    for layer, linear, _ in plan:
        if taken.setdefault(id(linear), layer) is not layer:
            raise ValueError(
                "Two edits would be merged into the same linear layer: a vector at the block and an edit at its MLP, "
                "or one at the attention and one at its heads. Merge one and keep the other as an adapter."
            )


def refuse_added_biases(plan: list[Step]) -> None:
    """Raise `ValueError` if merging would give a bias to a linear layer that has none: an engine that is pushed the
    merged weights has no such parameter, and vLLM skips those that it does not know."""
    for layer, linear, names in plan:
        affine = [layer.shared_edit(name).affine() for name in names]
        if linear.bias is None and any(parts is not None and parts[1] is not None for parts in affine):
            raise ValueError("Merging this adapter makes biases, which vLLM would leave out without a word.")


def refuse_to_save(model: nn.Module) -> None:
    """Make `model.save_pretrained` raise: its configuration has no bias where merging had to add one, so
    `from_pretrained` would drop the bias, silently."""
    vars(model)["save_pretrained"] = MethodType(_save_refused, model)


def _save_refused(model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "This model cannot be saved with the adapter merged: merging gave a bias to linear layers that have none in "
        f"{type(model).__name__}'s configuration, and `from_pretrained` would drop it. Save the adapter instead (the "
        "PeftModel's `save_pretrained`, before merging), or use an edit without a constant part (kind='linear', "
        "use_bias=False)."
    )
