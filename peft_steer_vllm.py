"""The vLLM plugin of peft-steer (entry point `vllm.general_plugins`): which models vLLM can steer.

vLLM loads it in every process of every engine where peft-steer is installed. It is therefore a module of its own that
imports nothing: `import peft_steer` would import PEFT. What steers is in `peft_steer.serving.vllm`, which is imported
by an engine that asked for it, with `additional_config={"peft_steer": {...}}`, or that lives in a process with a
steered model in training.
"""

import dataclasses
import importlib
import sys
from typing import Any, cast


# What a block of vLLM's returns: the hidden state in two parts, of which the next norm makes the sum ("deferred"), the
# hidden state and something else ("full"), or the hidden state alone ("tensor").
_NORMED = {"mlp": "post_feedforward_layernorm", "attention": "post_attention_layernorm"}
_PLAIN = {"mlp": "mlp", "attention": "self_attn"}
# vLLM's architecture -> that convention, and the names of the sites inside a block
ARCHITECTURES: dict[str, tuple[str, dict[str, str]]] = {
    "LlamaForCausalLM": ("deferred", _PLAIN),
    "MistralForCausalLM": ("deferred", _PLAIN),
    "Phi3ForCausalLM": ("deferred", _PLAIN),
    "Qwen2ForCausalLM": ("deferred", _PLAIN),
    "Qwen3ForCausalLM": ("deferred", _PLAIN),
    "Qwen3MoeForCausalLM": ("deferred", _PLAIN),
    "MixtralForCausalLM": ("deferred", {"mlp": "block_sparse_moe", "attention": "self_attn"}),
    "GemmaForCausalLM": ("deferred", _PLAIN),
    "Gemma2ForCausalLM": ("deferred", _NORMED),
    "Gemma3ForCausalLM": ("deferred", _NORMED),
    "CohereForCausalLM": ("full", _PLAIN),
    "Cohere2ForCausalLM": ("full", _PLAIN),
    "GraniteForCausalLM": ("tensor", _PLAIN),
    "OPTForCausalLM": ("tensor", {"mlp": "fc2", "attention": "self_attn"}),
}
# Where transformers has another name for a module than its checkpoints, by which vLLM goes.
CHECKPOINT_NAMES = {"MixtralForCausalLM": {"mlp": "block_sparse_moe"}}
OPTION = "peft_steer"  # the key of `additional_config`
_originals: dict[str, tuple[str, str]] = {}


def register() -> None:
    """Put a steerable subclass in the place of every model in the table, by name."""
    from vllm import ModelRegistry
    from vllm.config import VllmConfig

    for name in ARCHITECTURES:
        entry = ModelRegistry.models.get(name)
        if entry is not None and entry.module_name != __name__:
            _originals[name] = entry.module_name, entry.class_name
            ModelRegistry.models[name] = dataclasses.replace(entry, module_name=__name__, class_name=name)
    if not hasattr(VllmConfig, "_peft_steer"):
        VllmConfig._peft_steer = VllmConfig.__post_init__
        VllmConfig.__post_init__ = _checked


def _checked(config: Any, *args: Any, **kwargs: Any) -> None:
    """`VllmConfig.__post_init__`, which refuses what cannot be steered before anything is loaded."""
    if config.model_config is not None and _in_training():
        from peft_steer.serving.vllm.options import compute_as_trained

        compute_as_trained(config.model_config)
    config._peft_steer(*args, **kwargs)
    if options(config) is not None:
        from peft_steer.serving.vllm.options import check

        check(config)


def _in_training() -> bool:
    """Whether there are steered models in this process."""
    training = sys.modules.get("peft_steer.tuners.steer.following")
    return training is not None and len(training.TUNERS) > 0


def options(config: Any) -> dict[str, Any] | None:
    """What the user wrote for us in `additional_config`, if anything, unless `config` is a draft model's."""
    model, extra = config.model_config, config.additional_config
    if model is None or model.runner_type == "draft" or not isinstance(extra, dict):
        return None
    return extra.get(OPTION)


class Steerable:
    """Comes before a model class of vLLM."""

    _steering: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        model: Any = super()
        model.__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.__dict__["_steering"] = None
        if (options(vllm_config) is not None or _in_training()) and not prefix:
            from peft_steer.serving.vllm.models import steer

            self.__dict__["_steering"] = steer(cast(Any, self), vllm_config)

    def load_weights(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        if self._steering is not None:
            weights = self._steering.receive(weights)
        model: Any = super()
        return model.load_weights(weights, *args, **kwargs)


def __getattr__(name: str) -> type:
    """The steerable class of an architecture, made when vLLM asks for it."""
    if name not in _originals:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, class_name = _originals[name]
    base = getattr(importlib.import_module(module), class_name)
    # With the name and the place of the original: vLLM shows them, and looks for the source of what it compiles.
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "peft_steer_architecture": name}
    made = type(base)(base.__name__, (Steerable, base), members)
    globals()[name] = made
    return made
