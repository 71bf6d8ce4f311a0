"""`SteerModel`: injects the layers into a model, and everything PEFT does with an adapter."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from peft_steer.registration import register
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.devices import device_and_dtype

from . import following
from .config import STEER, SteerConfig
from .injection import (
    Plan,
    check_state_dict,
    injecting,
    plan_injection,
    resolve_sites,
)
from .layer import CHILD, INPUT_CHILD, SteerLayer, steered_layers
from .merging.plan import plan_merge, refuse_added_biases, refuse_to_save
from .merging.weighted_sums import add_up, config_of_sum
from .position_hooks import check_stacks, untrack
from .rows import check_rows, with_modules_of_rows, with_rows
from .strength import Strength
from .wrapping import unwrapped_key


MARKER = f"{CHILD}.steer_edit"  # ends `INPUT_CHILD`'s as well


class SteerModel(Strength, BaseTuner):
    """
    Edits hidden states at one place of every chosen block, as [`SteerConfig`] says ("Weight Updates as Activation
    Shifts: A Principled Framework for Steering", arXiv 2603.00425). The base model's weights are never touched, so it
    may be quantized in any way.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`SteerConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The steered model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_steer import PostBlockSteerConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, PostBlockSteerConfig(r=8, task_type="CAUSAL_LM"))
        ```
    """

    prefix: str = "steer_"
    tuner_layer_cls = SteerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's, of which it makes no class variable

    # --- injection

    _plan: Plan  # of the adapter that `inject_adapter` puts in: PEFT calls its parts one by one

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        with injecting(self, model, adapter_name, self.configs[adapter_name].positions):
            if state_dict is not None:  # PEFT looks for the names of the steered modules in front of the prefix
                child = rf"\.({INPUT_CHILD}|{CHILD})\.(?={self.prefix})"
                state_dict = {re.sub(child, ".", unwrapped_key(key)): x for key, x in state_dict.items()}
                self._check_sites_of(state_dict, model, adapter_name)
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )

    def _check_sites_of(self, state_dict: dict[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
        config = self.configs[adapter_name]
        names = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict if f".{self.prefix}" in key}
        wrong = names - resolve_sites(model, config).keys()
        if wrong:
            raise ValueError(
                f"The state dict has weights for {min(wrong)!r}, which the configuration does not steer "
                f"(site={config.site!r}): they belong to different adapters."
            )

    @property
    def configs(self) -> dict[str, SteerConfig]:
        """The configuration of each adapter."""
        return cast(dict[str, SteerConfig], self.peft_config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # the blocks are found in the model, not in a table of model types

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = cast(SteerConfig, peft_config)
        self._plan = plan_injection(model, config)
        check_stacks(model, config.positions, self._plan.sites)
        keep_unpacked(model)

    def _check_target_module_exists(  # type: ignore[override]  # PEFT's returns such an object too, undeclared
        self, peft_config: PeftConfig, key: str
    ) -> bool | _ExcludedModule:
        return key in self._plan.sites or (_ExcludedModule() if key in self._plan.excluded else False)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = self._plan.sites[current_key]
        layer = getattr(target, INPUT_CHILD if site.place == "heads" else CHILD, None)
        if layer is None:
            layer = SteerLayer(site)
        device, dtype = device_and_dtype(target, self.model)
        layer.update_layer(adapter_name, cast(SteerConfig, peft_config), site, device, dtype, group=self._plan.group)

    def _tuner_layers(self) -> list[SteerLayer]:
        return steered_layers(self.model)

    # --- rows of one batch with different adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = self._tuner_layers()
        check_rows(layers, adapter_names, args, kwargs)
        with with_modules_of_rows(self, adapter_names), with_rows(layers, adapter_names):
            yield

    # --- merging and unloading

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, **options: Any
    ) -> None:
        """Add an adapter that does what the weighted sum of others does: of edits at the same sites and positions that
        are affine (fixed vectors; linear ones and ReFT's without an activation, whose ranks add up), or nonlinear with
        the same activation and no bias.

        Args:
            adapters: their names.
            weights: a factor for each; the strength that each has now counts too.
            adapter_name: the name of the new one.

        Raises:
            ValueError: if no adapter of their kind equals the sum; says what to do instead.
        """
        config = config_of_sum(following.layers(self), self.configs, adapters, weights, adapter_name, options)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        add_up(self._tuner_layers(), adapters, weights, adapter_name)

    def _check_merge_allowed(self, adapter_names: list[str] | None = None) -> None:
        plan_merge(self.model, self.configs, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base's weights where that is exact; `merging/plan.py` says where it is. If an
        inference engine follows this model, show it the edits instead (see `following.py`).

        Raises:
            ValueError: before anything is changed: if it is not exact for one of them, if an active adapter would be
                left out and stop acting, or, with `safe_merge`, if a parameter of theirs is not finite. If TRL merges
                to push the weights to an engine: also if that would not take all of them.
        """
        if adapter_names is None and following.followers(self):
            following.publish(self)
            return
        if any(layer.disable_adapters for layer in self._tuner_layers()):
            raise ValueError("Cannot merge while the adapters are disabled; enable them first.")
        pushed = following.pushed_by_trl()
        with following.explaining(self, pushed):
            plan = plan_merge(self.model, self.configs, adapter_names, safe_merge)
            if pushed:
                refuse_added_biases(plan)
        for layer, _, names in plan:
            left_out = set(layer.active_adapters) & set(layer.steer_edit) - set(names) - set(layer.merged_adapters)
            if left_out:
                raise ValueError(
                    f"The adapters {sorted(left_out)} are active but would not be merged, and would stop acting. "
                    "Merge all active adapters together, or deactivate the others with `set_adapter`."
                )
        for layer, linear, names in plan:
            layer.merge_into(linear, names)

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back, bit for bit."""
        following.finish(self)
        for layer in self._tuner_layers():
            layer.unmerge()

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT declares None and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:  # active adapters that are not named are dropped, as PEFT drops them
            for layer, linear, names in plan_merge(self.model, self.configs, adapter_names, safe_merge):
                layer.merge_into(linear, names)
        layers = self._tuner_layers()
        if any(layer.merge_added_bias for layer in layers) and merge:
            refuse_to_save(self.model)
        for layer in layers:
            if not merge:
                layer.unmerge()
            layer.detach()
        untrack(self.model)
        # what is left to do is `modules_to_save`
        return cast(nn.Module, super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar))

    # --- the file

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # By our own marker and not by the names of modules, which PEFT 0.21 gets wrong below a checkpoint wrapper
        # (FSDP's `fsdp_activation_checkpointing`): it then saves an empty file.
        adapter = {key: x for key, x in state_dict.items() if f"{MARKER}.{adapter_name}." in key}
        steer = cast(SteerConfig, config)
        steer.intervention.before_saving(steer, adapter)
        return adapter

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if MARKER in key:  # PEFT looks for it just before the parameter's name
            return key.replace(f"{MARKER}.{adapter_name}.", f"{MARKER}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = {
            unwrapped_key(key).replace(f"{MARKER}.", f"{MARKER}.{adapter_name}."): x for key, x in state_dict.items()
        }
        check_state_dict(model, adapter_name, state_dict, MARKER)
        return state_dict


register(STEER, SteerConfig, SteerModel)
