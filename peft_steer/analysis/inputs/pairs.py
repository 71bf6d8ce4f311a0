"""A base model and what fine-tuning made of it: found, checked from their files alone, then loaded."""

import argparse
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import peft_steer  # noqa: F401  (registers the tuner types)
from peft_steer.sites import Block, select_blocks
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.hub import find_model

from .error_context import blaming


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_SAME = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Pair:
    """The loaded models, frozen and in evaluation mode.

    Attributes:
        base: The model before fine-tuning.
        tuned: After it: a model of the same shape, or the base's copy with a PEFT adapter. It shares no tensor with
            `base`, because some adapters change the base's weights when they are loaded (PiSSA).
        tokenizer: Of both.
    """

    base: PreTrainedModel
    tuned: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseSource:
    """A base model that is not loaded yet.

    Attributes:
        base: What `from_pretrained` loads.
        model_kwargs: For `from_pretrained`, of the base and of the copy below an adapter.
        tokenizer: The base's.
    """

    base: str
    model_kwargs: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase

    def load_base(self) -> PreTrainedModel:
        """Loads the base (once more), to the GPU if there is one."""
        return _load(self.base, self.model_kwargs)

    def load_adapter(self, adapter: str) -> PeftModel:
        """Loads an adapter of the base, on a base of its own."""
        return _frozen(PeftModel.from_pretrained(self.load_base(), adapter))


@dataclass(frozen=True)
class PairSource(BaseSource):
    """A checked pair that is not loaded yet.

    Attributes:
        tuned: A model's directory or hub id, or an adapter's.
        is_adapter: Which of the two.
    """

    tuned: str
    is_adapter: bool

    def load(self) -> Pair:
        """Loads both models."""
        if self.is_adapter:
            tuned = self.load_adapter(self.tuned)
        else:
            tuned = _load(self.tuned, {"dtype": self.model_kwargs["dtype"]})
        return Pair(self.load_base(), tuned, self.tokenizer)


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that [`find_base`] reads."""
    add = parser.add_argument_group("models").add_argument
    add("--base", required=True, metavar="DIR_OR_ID", help="a causal language model")
    add("--dtype", choices=DTYPES, default="float32", help="of both models (default: float32)")
    add("--load_in_4bit", action="store_true", help="quantize the base, also below an adapter, to nf4")
    add("--load_in_8bit", action="store_true", help="quantize the base, also below an adapter, to int8")


def add_pair_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flags that [`find_pair`] reads; without `required`, `--tuned` may be left out."""
    add_base_arguments(parser)
    optional = "" if required else " (optional)"
    parser.add_argument(
        "--tuned",
        required=required,
        metavar="DIR_OR_ID",
        help=f"the same model fine-tuned, or a PEFT adapter of it{optional}",
    )


def find_base(args: argparse.Namespace) -> BaseSource:
    """Finds `--base`. Only its configuration and its tokenizer are read.

    Raises:
        ValueError: If the flags contradict each other, or it is no causal language model with a tokenizer.
        OSError: If there is no such model.
    """
    if args.load_in_4bit and args.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit: choose one of them")
    model_kwargs: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if args.load_in_4bit:
        model_kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model_kwargs["dtype"]
        )
    elif args.load_in_8bit:
        model_kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    base = find_model(args.base).path
    config = _read_config(base, "--base")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"--base: {args.base!r} is a {config.model_type} model; it must be a causal language model")
    tokenizer = _read_tokenizer(base, "--base")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"--base: the tokenizer of {args.base!r} has neither an end nor a padding token; give it one")
    return BaseSource(base, model_kwargs, tokenizer)


def find_pair(args: argparse.Namespace) -> PairSource:
    """Finds and checks `--base` and `--tuned`. Only configurations, tokenizers and an adapter's weights are read.

    Raises:
        ValueError: If they differ in architecture, width, depth, vocabulary or tokenizer, if the adapter cannot be
            read, does not fit the base or adds tokens to the sequence, or if the flags contradict each other.
        OSError: If there is no such model.
    """
    source = find_base(args)
    is_adapter = _is_adapter(args.tuned)
    tuned = args.tuned if is_adapter else find_model(args.tuned).path
    if is_adapter:
        check_adapter(source.base, args.base, tuned, "--tuned")
    else:
        _check_configs(source.base, tuned)
    _check_tokenizers(source.tokenizer, tuned, is_adapter)
    if not is_adapter and (args.load_in_4bit or args.load_in_8bit):
        raise ValueError(
            "--load_in_4bit, --load_in_8bit: --tuned is a whole model, which is not quantized, and the rounding of "
            "the base would be taken for what fine-tuning did; leave the flag out, or give an adapter"
        )
    return PairSource(source.base, source.model_kwargs, source.tokenizer, tuned, is_adapter)


def blocks_of(model: PreTrainedModel | PeftModel) -> list[Block]:
    """The blocks of a model, named as in the base below its adapter.

    Raises:
        ValueError: If it has several stacks of them: an encoder-decoder.
    """
    blocks = select_blocks(model.get_base_model() if isinstance(model, PeftModel) else model)
    if len({block.stack for block in blocks}) > 1:
        raise ValueError(f"{type(model).__name__} has several stacks of blocks; only decoders can be analyzed.")
    return blocks


def check_adapter(base: str, base_name: str, adapter: str, flag: str) -> None:
    """Raises `ValueError`, naming `flag`, unless the adapter in the directory (or hub repository) `adapter` fits the
    model `base` (called `base_name` by the user): its tensors are put into the base's modules without memory (on the
    meta device)."""
    config = read_adapter_config(adapter, flag)
    if config.is_prompt_learning:
        raise ValueError(
            f"{flag}: {adapter!r} is a {config.peft_type.value} adapter, which adds tokens of its own: its hidden "
            "states are not those of the base's tokens. Choose another kind of adapter."
        )
    recorded = config.base_model_name_or_path
    if recorded and recorded not in (base, base_name):
        logger.warning("%s: %s was made for %s and is put on %s.", flag, adapter, recorded, base_name)
    with blaming(flag, adapter, "has no adapter weights that can be read", SafetensorError, RuntimeError):
        found = set(load_peft_weights(adapter, device="cpu"))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying to the meta device does nothing, says torch of every tensor
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        with blaming(flag, adapter, f"does not belong to the base {base!r}", RuntimeError):
            model = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
    places = set(get_peft_model_state_dict(model))
    extra, lacking = found - places, {name for name in places - found if model.base_model.prefix in name}
    if extra:
        raise ValueError(
            f"{flag}: {adapter!r} does not belong to the base {base!r}, which has no place for {len(extra)} of its "
            f"{len(found)} tensors, such as {min(extra)!r}"
        )
    if lacking:
        raise ValueError(
            f"{flag}: {adapter!r} does not belong to the base {base!r} or is damaged: it lacks "
            f"{len(lacking)} of {len(places)} tensors, such as {min(lacking)!r}"
        )


def read_adapter_config(adapter: str, flag: str) -> PeftConfig:
    """The configuration of an adapter; `ValueError`, naming `flag`, if it cannot be read."""
    with blaming(flag, adapter, "has no adapter_config.json that PEFT can read", TypeError, KeyError):
        return PeftConfig.from_pretrained(adapter)


def _is_adapter(path: str) -> bool:
    """Whether a directory or hub id holds an adapter."""
    if Path(path).is_dir():
        return (Path(path) / "adapter_config.json").is_file()
    try:
        PeftConfig.from_pretrained(path)
    except ValueError:  # "Can't find 'adapter_config.json'"
        return False
    return True


def _check_configs(base: str, tuned: str) -> None:
    ours, theirs = (_read_config(path, "--tuned").get_text_config() for path in (base, tuned))
    for name in _SAME:
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"--tuned: {tuned!r} has {name}={getattr(theirs, name)!r} and the base {base!r} has "
                f"{getattr(ours, name)!r}; it must be a fine-tuned version of the base"
            )


def _check_tokenizers(tokenizer: PreTrainedTokenizerBase, tuned: str, is_adapter: bool) -> None:
    if (is_adapter or Path(tuned).is_dir()) and not (Path(tuned) / "tokenizer_config.json").is_file():
        logger.info("%s has no tokenizer: it is taken to read the base's tokens", tuned)
    elif _read_tokenizer(tuned, "--tuned").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--tuned: {tuned!r} has another tokenizer than the base {tokenizer.name_or_path!r}: they do not read the "
            "same tokens. Give the base that it was trained from"
        )


def _read_config(path: str, flag: str) -> PreTrainedConfig:
    with blaming(flag, path, "is no model: no directory with its config.json, no hub id that can be reached"):
        return AutoConfig.from_pretrained(path)


def _read_tokenizer(path: str, flag: str) -> PreTrainedTokenizerBase:
    with blaming(flag, path, "has no tokenizer that can be loaded; save it there, beside the model"):
        return AutoTokenizer.from_pretrained(path)


def _load(path: str, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, **model_kwargs)
    keep_unpacked(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _frozen(model if getattr(model, "is_quantized", False) else model.to(device))


def _frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False)
