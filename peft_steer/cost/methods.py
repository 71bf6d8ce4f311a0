"""The methods to measure: from their names on the command line to adapted models that share the frozen weights."""

import copy
import re
from itertools import chain
from pathlib import Path

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_config, get_peft_model
from transformers import PreTrainedModel

import peft_steer  # noqa: F401  (registers the tuner types)
from peft_steer.utils.errors import UsageError
from peft_steer.utils.yaml import parse_yaml


PRESETS = {
    "lora": "LORA:r=8,target_modules=all-linear",
    "post_block": "STEER:kind=nonlinear",
    "post_block_linear": "STEER:kind=linear",
    "vector": "STEER:kind=vector",
    "loreft": "STEER:kind=loreft,site=mlp",
    "noreft": "STEER:kind=noreft,site=mlp",
    "direft": "STEER:kind=direft,site=mlp",
    "nodireft": "STEER:kind=nodireft,site=mlp",
    "lofit": "STEER:kind=lofit,site=heads",
    "jola": "STEER:kind=jola,site=heads",
    "joint": "JOINT_STEER_LORA:r=8,target_modules=all-linear",
}
# The least that trains anything in block 0: a vector added to its output, which keeps nothing for backward.
FLOOR = "STEER:kind=vector,layers_to_transform=0"


def parse_method(text: str) -> PeftConfig:
    """A PEFT configuration from a preset's name, from `PEFT_TYPE:key=value,...`, or from an adapter's `.json` file.

    Values are written as in YAML: `LORA:r=16,target_modules=[q_proj, v_proj]`.

    Raises:
        UsageError: If it is none of these, or PEFT refuses the fields.
    """
    spec = PRESETS.get(text, text)
    try:
        if spec.endswith(".json"):
            fields = PeftConfig.from_json_file(spec)
        else:
            peft_type, _, values = spec.partition(":")
            mapping = re.sub(r"(^|,)\s*(\w+)=", r"\1 \2: ", values)
            fields = {"peft_type": peft_type, **parse_yaml("{" + mapping + "}")}
            if None in fields.values():
                raise ValueError("every field needs a value, as in `r=8`")
        if fields.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(
                f"no PEFT type {fields.get('peft_type')!r}. Presets: {', '.join(PRESETS)}. "
                f"Types: {', '.join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))}."
            )
        return get_peft_config({"task_type": "CAUSAL_LM", **fields, "inference_mode": False})
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"method {text!r}: {error}") from error


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with its own modules and hooks but the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def adapt(model: PreTrainedModel, name: str) -> PeftModel:
    """`model`'s copy with the method `name`, whose frozen weights are `model`'s own.

    Raises:
        UsageError: If the method does not fit the model.
    """
    try:
        return get_peft_model(share(model), parse_method(name))
    except (TypeError, ValueError) as error:
        raise UsageError(f"method {name!r} on {type(model).__name__}: {error}") from error


def adapter_bytes(model: PeftModel, directory: Path) -> int:
    """The size of the adapter's weights file, which is saved to `directory`."""
    model.save_pretrained(str(directory))
    return (directory / "adapter_model.safetensors").stat().st_size
