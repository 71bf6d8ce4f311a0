"""What an engine is asked for: `additional_config={"peft_steer": {...}}`, checked before anything is loaded."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import vllm
from accelerate.state import AcceleratorState
from safetensors import safe_open

from peft_steer.tuners.steer import following
from peft_steer_vllm import ARCHITECTURES, options


logger = logging.getLogger(__name__)

TRIED = ("0.32.0",)  # the versions of vLLM that the tests were run with
KEPT = ("kind", "activation", "positions")  # what gives an edit its structure, beside the shapes of its tensors
SITES = ("block", "mlp", "attention")
_EXAMPLES = '{"adapter": DIR, "scale": 1.0} for one adapter in every request, {"sites": ["block"]} for one per request'


def check(config: Any) -> None:
    """Raises `ValueError` for what cannot be steered as asked, in the process that the user started."""
    asked = options(config)
    if not isinstance(asked, dict):
        raise ValueError(f"additional_config['peft_steer']={asked!r}: must be {_EXAMPLES}.")
    unknown = set(asked) - {"adapter", "scale", "sites", "layout"}
    if unknown:
        raise ValueError(f"additional_config['peft_steer']: unknown {sorted(unknown)}; it is {_EXAMPLES}.")
    if ("adapter" in asked) == ("sites" in asked):
        raise ValueError(f"additional_config['peft_steer']: exactly one of 'adapter' and 'sites': {_EXAMPLES}.")
    check_engine(config)
    if "sites" in asked:
        _check_sites(config, asked)
    else:
        _check_adapter(asked)


def check_engine(config: Any) -> None:
    """Raises `ValueError` for an engine that no adapter can steer; warns once of an untried version of vLLM."""
    architectures = config.model_config.architectures
    if not any(name in ARCHITECTURES for name in architectures):
        raise ValueError(
            f"peft-steer cannot steer {', '.join(architectures)} in vLLM, only {', '.join(sorted(ARCHITECTURES))}. "
            "Use transformers, where every architecture can be steered."
        )
    parallel = config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) > 1:
            raise ValueError(f"{name}={getattr(parallel, name)}: peft-steer steers engines with {name}=1.")
    if vllm.__version__ not in TRIED:
        logger.warning(
            "peft-steer was tried with vLLM %s, this is %s. Compare the log-probabilities of a few texts with those "
            "of transformers before you rely on it.",
            ", ".join(TRIED),
            vllm.__version__,
        )


def compute_as_trained(model_config: Any) -> None:
    """Gives an engine that is to follow a training without mixed precision the dtype of the model in training: TRL
    passes none, and vLLM would compute in bfloat16 what is trained in float32."""
    tuner = following.in_training(model_config.model)
    if tuner is None or not AcceleratorState._shared_state or AcceleratorState().mixed_precision != "no":
        return
    dtype = getattr(tuner.model, "dtype", model_config.dtype)
    if dtype != model_config.dtype:
        logger.info("The engine computes in %s, as the model that it follows.", dtype)
        model_config.dtype = dtype


def _check_sites(config: Any, asked: dict[str, Any]) -> None:
    sites = asked["sites"]
    if not isinstance(sites, list) or not sites or set(sites) - set(SITES):
        raise ValueError(f"additional_config['peft_steer']['sites']={sites!r}: must be a list of {list(SITES)}.")
    if "scale" in asked:
        raise ValueError("additional_config['peft_steer']['scale']: belongs to 'adapter'; per request it is DIR@0.5.")
    if config.lora_config is None:
        raise ValueError(
            "additional_config['peft_steer']['sites']: adapters per request ride in vLLM's LoRA slots; set "
            "enable_lora=True (--enable-lora)."
        )
    targets = config.lora_config.target_modules
    if targets is not None and "steering" not in targets:
        raise ValueError("lora_target_modules: peft-steer: add 'steering', or the places of the edits are left out.")


def _check_adapter(asked: dict[str, Any]) -> None:
    scale = asked.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"additional_config['peft_steer']['scale']={scale!r}: must be a finite number.")
    files = [Path(asked["adapter"]) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"additional_config['peft_steer']['adapter']: there is no file {str(file)!r}.")
    # The key of vLLM's compile cache has this dictionary in it, and the graph has the shapes of the edits in it.
    with safe_open(files[1], "pt") as tensors:
        shapes = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    config = json.loads(files[0].read_text())
    asked["layout"] = {"tensors": shapes, "config": {name: config.get(name) for name in KEPT}}
