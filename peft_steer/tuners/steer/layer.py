"""The interventions at one site, by adapter name: a child of the steered module, called by a hook on it."""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_steer.interventions import Intervention
from peft_steer.interventions.optimizer_hooks import Group
from peft_steer.positions.spec import Selection, split
from peft_steer.sites import Site
from peft_steer.utils.devices import device_and_dtype

from .config import SteerConfig
from .merging.folding import Folding
from .strength import LayerStrength


CHILD = "steering"  # must not contain the prefix `steer_`, or PEFT takes the container for a weight
# Its name where the module's input is edited: some architectures' `attention` and `heads` are at the same module.
INPUT_CHILD = f"input_{CHILD}"

Rows = tuple[list[int], int]  # some rows of a batch, and how many it has


def steer_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: replace the hidden state that `module` returns (a tensor, or a tuple's first item) by the steered
    one.

    It is a module-level function, so that a steered model can be copied and pickled.
    """
    layer = getattr(module, CHILD)
    if isinstance(output, torch.Tensor):
        return layer(output)
    if isinstance(output, tuple):
        return (layer(output[0]), *output[1:])
    raise TypeError(
        f"{type(module).__name__} returns {type(output).__name__}; only a tensor or a tuple that begins with one can "
        "be steered. Choose another `site` or `target_modules`."
    )


def steer_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: replace the hidden state that `module` is given by the steered one."""
    if not args:
        raise TypeError(f"{type(module).__name__} gets no positional argument: its input cannot be steered.")
    return (getattr(module, INPUT_CHILD)(args[0]), *args[1:])


class SteerLayer(Folding, LayerStrength, BaseTunerLayer):
    """The edits of one module's output, or of its input.

    With several active adapters every edit reads the same unsteered `h`: `out = h + sum_i scale_i dh_i(h)`, whatever
    their order.

    Args:
        site ([`Site`]): where the edits are made; this layer becomes a child of the site's module.
    """

    adapter_layer_names = ("steer_edit",)
    other_param_names = ("scaling", "initial_scaling", "positions")

    cast_input_dtype_enabled = True  # PEFT's switch (`disable_input_dtype_casting`); inputs are never cast here

    steer_edit: nn.ModuleDict

    # Which tokens the present forward pass has; see `position_hooks.py`.
    selection: Selection | None = None
    # Of each edit in the last forward pass: its mask, the shape of its tokens, which rows they are. Masks are kept as
    # they are, and counted when somebody asks.
    edited: list[tuple[torch.Tensor | bool, torch.Size, Rows | None]]

    def __init__(self, site: Site):
        super().__init__()
        self.at_input = site.place == "heads"
        self.in_features = self.out_features = site.width
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())  # `steer_edit`
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.positions: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self.row_adapters: list[str] | None = None  # an adapter for each row of the batch
        self.edited = []
        self.attach(site.module)

    def attach(self, module: nn.Module) -> None:
        """Become a child of `module`, and steer it."""
        self._steered = (module,)  # in a tuple: the parent is not a submodule
        module.add_module(self.child, self)
        _layers_changed()
        if self.at_input:
            self._hook = module.register_forward_pre_hook(steer_input)
        else:  # prepended, so that `output_hidden_states` records the steered state
            self._hook = module.register_forward_hook(steer_output, prepend=True)

    @property
    def steered_module(self) -> nn.Module:
        """The module whose output (at `site="heads"`: whose input) this layer edits."""
        return self._steered[0]

    @property
    def child(self) -> str:
        """The name of this layer in the module that it steers."""
        return INPUT_CHILD if self.at_input else CHILD

    def detach(self) -> None:
        """Remove this layer from the module that it steers."""
        self._hook.remove()
        delattr(self.steered_module, self.child)
        _layers_changed()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, or after unpickling
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        _layers_changed()

    def update_layer(
        self,
        adapter_name: str,
        config: SteerConfig,
        site: Site,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapter `adapter_name`; `kwargs` are those of [`build_edit`]."""
        names = ("shared",) if config.share_weights else ("prefix", "suffix")
        edits = {name: self.build_edit(config, site, device=device, dtype=dtype, **kwargs) for name in names}
        self.steer_edit[adapter_name] = edits["shared"] if config.share_weights else nn.ModuleDict(edits)
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = config.scale
        self.positions[adapter_name] = config.positions

    def build_edit(self, config: SteerConfig, site: Site, group: Group | None = None, **kwargs: Any) -> Intervention:
        """One edit of an adapter; `group` stands for the adapter in the whole model."""
        return config.intervention.build(config, site.width, site.rank, site.head_dim, group, **kwargs)

    def edits(self, adapter_name: str) -> dict[str, Intervention]:
        """The edits of an adapter by their names below it: one, named `""`, or one for the prompt's `"prefix"` and one
        for its `"suffix"`; none if the adapter is not here."""
        if adapter_name not in self.steer_edit:
            return {}
        edit = self.steer_edit[adapter_name]
        named = dict(edit.items()) if isinstance(edit, nn.ModuleDict) else {"": edit}
        return cast(dict[str, Intervention], named)

    def shared_edit(self, adapter_name: str) -> Intervention:
        """The edit of an adapter that has one for all tokens (`share_weights`)."""
        return self.edits(adapter_name)[""]

    def positions_in_use(self) -> set[str]:
        """The specifications other than `"all"` of the adapters that may act in the present forward pass."""
        names = self.active_adapters if self.row_adapters is None else set(self.row_adapters)
        specs = {self.positions[name] for name in names if name in self.positions}
        return {part for spec in specs - {"all"} for part in (spec, *split(spec))}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Steered hidden states, same shape `(..., d)` and dtype."""
        if not torch.compiler.is_compiling():
            self.edited = []
        if self.disable_adapters or self.merged_adapters:
            return hidden_states
        if self.row_adapters is not None:
            return self._steer_rows(hidden_states, self.row_adapters)
        active = [name for name in self.active_adapters if name in self.steer_edit]
        if len(active) == 1:
            return self._steer(active[0], hidden_states)
        out = hidden_states
        for name in active:
            out = out + (self._steer(name, hidden_states) - hidden_states)
        return out

    def _steer_rows(self, hidden_states: torch.Tensor, row_adapters: list[str]) -> torch.Tensor:
        # Rows of one item are consecutive: its beams, or its tokens where a model flattens the batch.
        items = hidden_states.reshape(len(row_adapters), -1, hidden_states.shape[-1])
        out = items.clone()
        for name in sorted(set(row_adapters)):
            if name in self.steer_edit:
                chosen = [i for i, row_name in enumerate(row_adapters) if row_name == name]
                out[chosen] = self._steer(name, items[chosen], (chosen, len(row_adapters)))
        return out.view(hidden_states.shape)

    def _steer(self, name: str, h: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """`h` steered by one adapter at its positions. `rows`: those of the batch that `h` has, if not all."""
        edits, scale, positions = self.edits(name), self.strength(name), self.positions[name]
        if "" in edits:
            return self._edit_at(positions, edits[""], h, scale, rows)
        for edit, ends in zip(edits.values(), split(positions), strict=True):  # of different tokens
            h = self._edit_at(ends, edit, h, scale, rows)
        return h

    def _edit_at(
        self, positions: str, edit: Intervention, h: torch.Tensor, scale: float, rows: Rows | None
    ) -> torch.Tensor:
        if positions == "all":
            self._record(True, h, rows)
            return edit(h, scale)
        if self.selection is None:
            raise ValueError(
                f"`positions={positions!r}`: the steered layers do not know where the prompt ends: a part of the "
                "model was called by itself, or is recomputed by something other than transformers' gradient "
                "checkpointing. Call the whole model (`model(...)` or `model.generate(...)`)."
            )
        mask = self.selection.mask(positions)
        if rows is not None and isinstance(mask, torch.Tensor):
            chosen, total = rows
            mask = mask.reshape(total, -1)[chosen]
        if isinstance(mask, torch.Tensor) and mask.numel() * h.shape[-1] != h.numel():
            raise ValueError(f"`positions`: hidden states {tuple(h.shape)} for tokens {tuple(mask.shape)}.")
        self._record(mask, h, rows)
        if mask is True:
            return edit(h, scale)
        if not isinstance(mask, torch.Tensor):
            return h
        if torch.compiler.is_compiling():  # the number of rows would be a shape that depends on data
            return torch.where(mask.reshape(*h.shape[:-1], 1), edit(h, scale), h)
        flat = h.reshape(-1, h.shape[-1])
        tokens = self.selection.rows(positions) if rows is None else mask.flatten().nonzero().flatten()
        return flat.index_copy(0, tokens, edit(flat.index_select(0, tokens), scale)).view(h.shape)

    def _record(self, mask: torch.Tensor | bool, h: torch.Tensor, rows: Rows | None) -> None:
        if not torch.compiler.is_compiling():  # a side effect, which a compiled checkpoint does not allow
            self.edited.append((mask, h.shape[:-1], rows))

    @property
    def steered(self) -> torch.Tensor | None:
        """The mask of what was edited in the last forward pass, `(rows, tokens)`; None if no adapter was on."""
        whole = None
        for mask, shape, rows in self.edited:
            chosen, total = rows or (slice(None), shape[0])
            if whole is None:
                whole = torch.zeros(total, *shape[1:], dtype=torch.bool)
            whole[chosen] |= torch.tensor(mask) if isinstance(mask, bool) else mask.reshape(shape).cpu()
        return whole

    # --- on and off

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Cannot delete adapter {adapter_name!r} while it is merged; unmerge it first.")
        super().delete_adapter(adapter_name)

    # --- what `BaseTunerLayer` expects of a layer that wraps a `base_layer`, which this one does not

    def get_base_layer(self) -> nn.Module:
        return self

    @property
    def weight(self) -> torch.Tensor:
        raise AttributeError(f"{type(self).__name__} has no attribute 'weight': it edits activations.")

    @property
    def bias(self) -> torch.Tensor:
        raise AttributeError(f"{type(self).__name__} has no attribute 'bias': it edits activations.")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Called after loading with `low_cpu_mem_usage`: the weights keep the dtype of the file.
        if adapter_name in self.steer_edit:
            self.steer_edit[adapter_name].to(device or device_and_dtype(self.steered_module, self.steered_module)[0])


_layers_state = object()  # another one whenever a layer is made, copied, loaded or taken off


def _layers_changed() -> None:
    global _layers_state
    _layers_state = object()


def steered_layers(model: nn.Module) -> list[SteerLayer]:
    """The steering layers in `model`, in its order. The list is kept on `model`: a search through all modules at every
    forward pass would take as long as a block."""
    if torch.compiler.is_compiling():
        return [module for module in model.modules() if isinstance(module, SteerLayer)]
    kept: tuple[object, list[SteerLayer]] = vars(model).get("_kept_layers", (None, []))
    if kept[0] is not _layers_state:
        kept = (_layers_state, [module for module in model.modules() if isinstance(module, SteerLayer)])
        vars(model)["_kept_layers"] = kept
    return kept[1]


def steered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the adapters in `model` steer, by qualified name: their outputs are edited, or at
    `site="heads"` their inputs.

    Args:
        model: any model, wrapped by PEFT or not.
    """
    names = {id(m): name for name, m in model.named_modules()}
    return {names[id(layer.steered_module)]: layer.steered_module for layer in steered_layers(model)}


def forget_layers(model: nn.Module) -> None:
    """Remove the lists that [`steered_layers`] keeps."""
    for module in model.modules():
        vars(module).pop("_kept_layers", None)
