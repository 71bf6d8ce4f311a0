"""A saved adapter as an engine takes it: forms and LoRA matrices, read without a base model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from peft_steer import JointSteerLoraConfig, SteerConfig
from peft_steer.interventions import KINDS
from peft_steer.interventions.low_rank_form import LowRankForm

from .options import SITES


_WHERE = ".steering."  # in the name of a parameter: after the steered module, before the edit's own names
_TYPES = ("STEER", "JOINT_STEER_LORA")
# Of a LoRA half: what vLLM would leave out, silently or not.
_REFUSED_LORA = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "LoRA's biases",
    "trainable_token_indices": "trained embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA on parameters",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter, with its strength in its tensors.

    Attributes:
        forms: by transformers' name of the steered module.
        lora: `lora_A` and `lora_B` by the names of PEFT's file; empty without a LoRA half.
        positions: which tokens it edits.
        hidden_size, num_blocks: those of the model that it was made for.
    """

    forms: dict[str, LowRankForm]
    lora: dict[str, torch.Tensor]
    positions: str
    hidden_size: int
    num_blocks: int

    @property
    def rank(self) -> int:
        """The largest rank in it, at least 1."""
        ranks = [len(form.A) for form in self.forms.values()]
        return max([1, *ranks, *(len(x) for name, x in self.lora.items() if ".lora_A." in name)])

    def check_fits(self, what: str, hidden_size: int, num_blocks: int) -> None:
        """Raises `ValueError` if it was made for a model of another shape; `what` names it."""
        for name, mine, theirs in (
            ("hidden_size", self.hidden_size, hidden_size),
            ("num_blocks", self.num_blocks, num_blocks),
        ):
            if mine != theirs:
                raise ValueError(f"{what} was made for a model with {name}={mine}; this one has {theirs}.")


def is_ours(directory: str) -> bool:
    """Whether it holds an adapter of this package."""
    return _raw_config(directory).get("peft_type") in _TYPES


def positions_of(directory: str) -> str:
    """Which tokens the adapter in a directory edits, whatever its kind."""
    config = _raw_config(directory)
    return config.get("positions", "all") if config.get("peft_type") == "STEER" else "all"


def _raw_config(directory: str) -> dict:
    file = Path(directory) / "adapter_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def split_scale(path: str) -> tuple[str, float]:
    """`"DIR@0.5"` as `("DIR", 0.5)`; a directory that exists by that name is itself.

    Raises:
        ValueError: if what follows the `@` is no finite number.
    """
    if "@" not in path or Path(path).exists():
        return path, 1.0
    directory, _, strength = path.rpartition("@")
    if not Path(directory).is_dir():
        return path, 1.0
    try:
        scale = float(strength)
    except ValueError:
        raise ValueError(f"{path!r}: {strength!r} is no strength; write DIR@0.5 for half of it.") from None
    if not abs(scale) < float("inf"):
        raise ValueError(f"{path!r}: the strength must be finite.")
    return directory, scale


@torch.no_grad()
def read(directory: str, scale: float = 1.0) -> Adapter:
    """Reads what `save_pretrained` wrote, at `scale` times its own strength.

    Raises:
        ValueError: if no engine could run it; names the field and says what to do instead.
    """
    config = cast(SteerConfig | JointSteerLoraConfig, PeftConfig.from_pretrained(directory))
    steer = config.steer_config() if isinstance(config, JointSteerLoraConfig) else config
    _check(directory, config, steer)
    edits: dict[str, dict[str, torch.Tensor]] = {}
    lora = {}
    for key, x in load_file(Path(directory) / "adapter_model.safetensors").items():
        module, mark, parameter = key.removeprefix("base_model.model.").rpartition(_WHERE)
        if mark:
            edits.setdefault(module, {})[parameter.rpartition(".")[2]] = x
        else:
            lora[key] = x
    hidden_size, num_blocks = cast(int, steer.hidden_size), cast(int, steer.num_blocks)  # checked: not None
    forms, ranks = {}, steer.rank_pattern or {}
    for module, state in edits.items():
        state.pop("steps", None)  # counts for the projection of a joint adapter
        rank = ranks.get(get_pattern_key(list(ranks), module), steer.r)
        edit = KINDS[steer.kind].build(steer, hidden_size, rank, dtype=torch.float32)
        edit.load_state_dict(state)
        form = edit.low_rank(steer.scale * scale)
        assert form is not None, "checked: not an edit of heads"
        forms[module] = form
    if isinstance(config, JointSteerLoraConfig):
        lora = {key: _scaled(config, key, x, scale) for key, x in lora.items()}
    elif lora:
        raise ValueError(f"{directory!r} has tensors that are no edit's, such as {min(lora)!r}.")
    return Adapter(forms, lora, steer.positions, hidden_size, num_blocks)


def _check(directory: str, config: SteerConfig | JointSteerLoraConfig, steer: SteerConfig) -> None:
    def refuse(field: str, why: str) -> None:
        raise ValueError(f"{directory!r} cannot be served by vLLM: {field}: {why}. Use transformers for it.")

    if set(steer.sites) - set(SITES):
        refuse(f"site={steer.site!r}", f"vLLM steers {', '.join(map(repr, SITES))}")
    if config.modules_to_save:
        refuse(f"modules_to_save={config.modules_to_save!r}", "the base's modules are served, not trained copies")
    if not steer.share_weights:
        refuse("share_weights=False", "a slot has one edit for the tokens of a request")
    if None in (steer.hidden_size, steer.num_blocks):
        refuse("hidden_size", "the adapter does not say which model it was made for; save it with this version")
    for field, what in _REFUSED_LORA.items():
        if getattr(config, field, None):
            refuse(field, f"vLLM does not run {what}")
    if isinstance(config, JointSteerLoraConfig) and config.bias != "none":
        refuse(f"bias={config.bias!r}", "vLLM does not run trained biases")
    if isinstance(config, JointSteerLoraConfig) and steer.positions != "all":
        refuse(f"steer_positions={steer.positions!r}", "its two halves would act on different tokens of a slot")


def _scaled(config: JointSteerLoraConfig, key: str, x: torch.Tensor, scale: float) -> torch.Tensor:
    """A LoRA matrix with LoRA's own factor, and ours, in `lora_B`."""
    if ".lora_B." not in key:
        return x.float().contiguous()
    module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    return (x.float() * (scale * alpha / (rank**0.5 if config.use_rslora else rank))).contiguous()
