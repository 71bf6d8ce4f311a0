"""An adapter per request: the directory that PEFT saved, in a slot of vLLM's LoRA manager."""

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager

from peft_steer.positions.spec import Layout, select

from . import private
from .adapters import Adapter, is_ours, positions_of, read, split_scale
from .layers import SlottedEdit, pack
from .places import CHILD, Places


_positions: dict[tuple[int, str], str] = {}  # by the id and the path of an adapter


def open_slots() -> None:
    """Have vLLM's LoRA manager fill our layers, and read our adapters; once in a process."""
    private.keep_to_slots()
    private.add_lora_layer(SlottedEdit)
    private.wrap_loading(_load)
    private.wrap_token_mapping(_select)


def _load(manager: WorkerLoRAManager, request: Any) -> LoRAModel | None:
    directory, scale = split_scale(request.lora_path)
    directory = get_adapter_absolute_path(directory)
    if not is_ours(directory):
        if scale != 1:
            raise ValueError(f"{request.lora_path!r}: a strength can be given to steering adapters only.")
        return None
    steering = getattr(private.model_of(manager), "_steering", None)
    if steering is None:
        raise ValueError(
            f"{directory!r} is a steering adapter, and the engine was not opened for them; start it with "
            '--additional-config \'{"peft_steer": {"sites": ["block"]}}\'.'
        )
    adapter = read(directory, scale)
    adapter.check_fits(repr(directory), steering.hidden_size, steering.num_blocks)
    if adapter.positions != "all" and steering.prefix_caching:
        raise ValueError(
            f"{directory!r}: positions={adapter.positions!r}: a cached prefix may have been computed where another of "
            "its tokens was steered. Start the engine with enable_prefix_caching=False (--no-enable-prefix-caching)."
        )
    lora = private.make_lora(manager, request, _tensors(adapter, steering.places), adapter.rank)
    missing = set(lora.loras) - private.modules_with_slots(manager)
    missing = {name for name in missing if ".experts" not in name}  # vLLM packs them under other names
    if missing:
        raise ValueError(
            f"{directory!r} acts at {min(missing)!r}, where the engine has no slots: it was opened for the sites "
            f"{steering.sites}" + (", or without that module among lora_target_modules." if adapter.lora else ".")
        )
    _positions[request.lora_int_id, request.lora_path] = adapter.positions
    return lora


def _tensors(adapter: Adapter, places: Places) -> dict[str, torch.Tensor]:
    tensors = dict(adapter.lora)
    for name, form in adapter.forms.items():
        key = f"base_model.model.{places.checkpoint_name(name)}.{CHILD}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = pack(form)
    return tensors


def _select(request: Any, first: int, n: int, prompt_length: int) -> list[bool] | None:
    """Which of the tokens `first` to `first + n` of a sequence the adapter of a request edits."""
    key = request.lora_int_id, request.lora_path
    if key not in _positions:  # vLLM maps the tokens of a batch before it loads what the batch needs
        _positions[key] = positions_of(get_adapter_absolute_path(split_scale(request.lora_path)[0]))
    if _positions[key] == "all":
        return None
    index = torch.arange(first, first + n)[None]
    layout = Layout(index, torch.full_like(index, prompt_length), torch.ones_like(index, dtype=torch.bool))
    return select(_positions[key], layout)[0].tolist()
