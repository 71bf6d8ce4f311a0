"""`JointSteerLoraModel`: PEFT's LoRA, and the steering layers put in after it."""

import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.integrations import init_empty_weights
from torch import nn

from peft_steer.interventions import LowRank
from peft_steer.registration import register
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.devices import device_and_dtype

from ..steer import following
from ..steer.injection import check_state_dict, injecting, plan_injection
from ..steer.layer import CHILD, steered_layers
from ..steer.position_hooks import check_stacks, untrack
from ..steer.rows import with_rows
from ..steer.strength import Strength
from ..steer.wrapping import unwrapped_key
from .config import JOINT_STEER_LORA, JointSteerLoraConfig, of_steering_half
from .layer import CONTAINER, JointPlan, JointSteerLayer, plan_writers
from .merging import keep_steering
from .saving import project_for_saving


MARKER = f".{CHILD}.{CONTAINER}"
HALVES = ("both", "lora", "steer")


class JointSteerLoraModel(Strength, LoraModel):
    """
    LoRA and steering in one adapter ("Weight Updates as Activation Shifts", arXiv 2603.00425, joint adaptation):
    PEFT's [`~peft.LoraModel`], with the edits of a [`SteerModel`] at the blocks. LoRA's own layers are PEFT's, for
    every kind of quantized base.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`JointSteerLoraConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The adapted model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_steer import JointSteerLoraConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> config = JointSteerLoraConfig(r=8, target_modules="all-linear", steer_r=8, task_type="CAUSAL_LM")
        >>> model = get_peft_model(model, config)
        ```
    """

    tuner_layer_cls = (LoraLayer, JointSteerLayer)  # type: ignore[assignment]  # PEFT asks isinstance(m, it) alone

    # --- injection: LoRA first, or PEFT would take the steering layers for an earlier adapter and not freeze the base

    _plan: JointPlan  # of the adapter that `inject_adapter` puts in

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        config = self.configs[adapter_name]
        with injecting(self, model, adapter_name, config.steer_positions):
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict and {key: x for key, x in state_dict.items() if MARKER not in key},
            )
            names = [
                name
                for name in self._plan.steering.sites
                if state_dict is None or any(f"{name}{MARKER}." in key for key in state_dict)
            ]
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._inject_steering(adapter_name, config, names)
            self.set_halves(self._halves)

    @property
    def configs(self) -> dict[str, JointSteerLoraConfig]:
        """The configuration of each adapter."""
        return cast(dict[str, JointSteerLoraConfig], self.peft_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = cast(JointSteerLoraConfig, peft_config)
        super()._prepare_model(config, model)
        steer = config.steer_config()
        with of_steering_half():
            plan = plan_injection(model, steer)
            check_stacks(model, steer.positions, plan.sites)
        writers = plan_writers(plan.sites, config, partial(self._is_targeted, config))
        where = {name: device_and_dtype(site.module, model) for name, site in plan.sites.items()}
        self._plan = JointPlan(plan, writers, where)
        config.steer_hidden_size, config.steer_num_blocks = steer.hidden_size, steer.num_blocks
        keep_unpacked(model)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        as_lora = copy.copy(peft_config)  # PEFT asks for the type
        as_lora.peft_type = PeftType.LORA
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def _is_targeted(self, config: JointSteerLoraConfig, name: str) -> bool:
        if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:  # PEFT has not resolved it yet
            config = copy.copy(config)
            config.target_modules = [name]
        return bool(self._check_target_module_exists(config, name))

    def _inject_steering(self, adapter_name: str, config: JointSteerLoraConfig, names: list[str]) -> None:
        steer = config.steer_config()
        active = self.active_adapters
        lead = next(m for m in self.model.modules() if isinstance(m, LoraLayer) and adapter_name in m.scaling)
        for name in names:
            # LoRA may have put another module in its place.
            site = replace(self._plan.steering.sites[name], module=self.model.get_submodule(name))
            layer = getattr(site.module, CHILD, None)
            if layer is None:
                layer = JointSteerLayer(site)
                layer.set_adapter(active)
            constraint = None
            if name in self._plan.writers and issubclass(steer.intervention, LowRank):
                constraint = {
                    "lora": self.model.get_submodule(self._plan.writers[name]),
                    "adapter_name": adapter_name,
                    "orthogonal": (config.orthogonal or "always") if config.constrained else "none",
                    "interval": config.orthogonal_interval or 1,
                }
            layer.update_layer(adapter_name, steer, site, *self._plan.where[name], constraint=constraint)
            layer.follow(adapter_name, lead)
            trainable = adapter_name in active and not config.inference_mode
            layer.steer_edit[adapter_name].requires_grad_(trainable)

    # --- what is on

    _halves = "both"

    def set_halves(self, halves: str) -> AbstractContextManager[object]:
        """Choose what acts of every active adapter: `"both"`, `"lora"` alone or `"steer"` alone.

        It takes effect at once and lasts; used in a `with` statement, until its end. What is off has no gradients.
        """
        if halves not in HALVES:
            raise ValueError(f"`halves={halves!r}` is unknown; choose one of {', '.join(map(repr, HALVES))}.")
        before, self._halves = self._halves, halves
        for layer in self._tuner_layers():
            if isinstance(layer, JointSteerLayer):
                layer.muted = halves == "lora"
            elif layer.disable_adapters != (self._disabled or halves == "steer"):
                layer._disable_adapters = not layer.disable_adapters
        stack = ExitStack()
        stack.callback(lambda: self.set_halves(before))
        return stack

    _disabled = False

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._disabled = not enabled
        self.set_halves(self._halves)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names: list[str] | None = kwargs.get("adapter_names")
        with (
            super()._enable_peft_forward_hooks(*args, **kwargs),
            with_rows(self._steer_layers(), adapter_names) if adapter_names else nullcontext(),
        ):
            yield

    def _steer_layers(self) -> list[JointSteerLayer]:
        return [layer for layer in steered_layers(self.model) if isinstance(layer, JointSteerLayer)]

    # --- merging and unloading

    def _check_merge_allowed(self) -> None:
        if self._steer_layers():
            raise ValueError(
                "The steering half of a joint adapter cannot be merged: it reads the skip connection, which no "
                "linear layer returns. `merge_lora_and_unload()` folds in the LoRA half and keeps the other as an "
                "adapter; `unload()` removes both."
            )
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]  # PEFT's

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raises `ValueError`, unless an inference engine follows this model: then the LoRA half is merged and the
        engine is shown the edits (see `following.py`)."""
        if adapter_names is None and following.followers(self):
            following.publish(self)
            return
        with following.explaining(self, following.pushed_by_trl()):
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back."""
        if not following.finish(self):
            super().unmerge_adapter()  # type: ignore[no-untyped-call]  # PEFT's

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT declares None and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for layer in self._steer_layers():
            layer.detach()
        untrack(self.model)
        return cast(nn.Module, super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names))

    def merge_lora_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> PeftModel:
        """Fold the LoRA half of adapters into the base model, and keep their steering half as plain adapters.

        It does not work in place: use the model that is returned. Its `save_pretrained` saves the steering adapters;
        the base that they belong to is what its `unload()` returns, with LoRA merged.

        Args:
            progressbar, safe_merge: as `merge_and_unload` has them.
            adapter_names: the adapters to merge; by default the active ones. Others are dropped.

        Returns:
            A PEFT model with a [`SteerConfig`] adapter for each of them, all active.
        """
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]  # PEFT's
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names:
            raise ValueError(f"`adapter_names={adapter_names!r}`: there are {list(self.peft_config)} to merge.")
        return keep_steering(self, names, progressbar=progressbar, safe_merge=safe_merge)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "Joint adapters cannot be combined into one: a nonlinear edit has no weighted sum of its rank. Activate "
            "them together instead, `model.base_model.set_adapter([...])`, each with its `model.set_scale(name, x)`."
        )

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
        state_dict = project_for_saving(model, adapter_name, state_dict)
        found: dict[str, torch.Tensor] = super()._get_adapter_state_dict(  # type: ignore[no-untyped-call]  # PEFT's
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if not any(MARKER in key for key in found):
            # PEFT 0.21 goes by the names of modules, and finds nothing below a checkpoint wrapper (FSDP's
            # `fsdp_activation_checkpointing`): it would save an empty file.
            ours = re.compile(rf"\.lora_[^.]+\.{re.escape(adapter_name)}(\.|$)")
            found |= {key: x for key, x in state_dict.items() if ours.search(key)}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = {unwrapped_key(key): x for key, x in state_dict.items()}
        state_dict = super()._remap_adapter_state_dict_for_load(  # type: ignore[no-untyped-call]  # PEFT's
            model, config, adapter_name, state_dict
        )
        check_state_dict(model, adapter_name, state_dict, MARKER)
        return state_dict

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        convert: Any = super(LoraModel, cls)._convert_state_dict_for_initial_model  # PEFT's default refuses, by name
        return cast(dict[str, torch.Tensor], convert(*args, **kwargs))


register(JOINT_STEER_LORA, JointSteerLoraConfig, JointSteerLoraModel)
