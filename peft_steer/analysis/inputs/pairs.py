"""A base model and what fine-tuning made of it: found, checked from their files alone, then loaded."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from peft import PeftModel
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

from peft_steer.sites import Block, select_blocks
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.devices import default_device
from peft_steer.utils.errors import UsageError
from peft_steer.utils.hub import find_model

from .adapters import check_adapter, is_adapter
from .error_context import error_context


logger = logging.getLogger(__name__)

Model: TypeAlias = PreTrainedModel | PeftModel
DTYPES = ("float32", "bfloat16", "float16")
_EQUAL_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


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
    tuned: Model
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
        """Loads the base (once more), to the accelerator if there is one."""
        return _load(self.base, self.model_kwargs)

    def load_adapter(self, adapter: str) -> PeftModel:
        """Loads an adapter of the base, on a base of its own."""
        return _frozen(PeftModel.from_pretrained(self.load_base(), adapter))


@dataclass(frozen=True)
class PairSource(BaseSource):
    """A checked pair that is not loaded yet.

    Attributes:
        tuned: The directory or hub id of a model or of an adapter.
        is_adapter: Whether it is an adapter.
    """

    tuned: str
    is_adapter: bool

    def load(self) -> Pair:
        """Loads both models."""
        return Pair(self.load_base(), self._load_tuned(), self.tokenizer)

    def _load_tuned(self) -> Model:
        if self.is_adapter:
            return self.load_adapter(self.tuned)
        return _load(self.tuned, {"dtype": self.model_kwargs["dtype"]})


def find_base(args: argparse.Namespace) -> BaseSource:
    """Finds `--base`. Only its configuration and its tokenizer are read.

    Raises:
        UsageError: If there is no such model, if it is not a causal language model with a tokenizer, or if the flags
            contradict each other.
    """
    if args.load_in_4bit and args.load_in_8bit:
        raise UsageError("--load_in_4bit and --load_in_8bit: choose one of them")
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
        raise UsageError(f"--base: {args.base!r} is a {config.model_type} model; it must be a causal language model")
    tokenizer = _read_tokenizer(base, "--base")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UsageError(f"--base: the tokenizer of {args.base!r} has neither an end nor a padding token; give it one")
    return BaseSource(base, model_kwargs, tokenizer)


def find_pair(args: argparse.Namespace) -> PairSource:
    """Finds and checks `--base` and `--tuned`. Only configurations, tokenizers and an adapter's weights are read.

    Raises:
        UsageError: If there is no such model, if the two differ in architecture, width, depth, vocabulary or
            tokenizer, if the adapter cannot be read, does not fit the base or adds tokens to the sequence, or if the
            flags contradict each other.
    """
    source = find_base(args)
    given_adapter = is_adapter(args.tuned)
    tuned = args.tuned if given_adapter else find_model(args.tuned).path
    if given_adapter:
        check_adapter(source.base, args.base, tuned, "--tuned")
    else:
        _check_configs(source.base, tuned)
    _check_tokenizers(source.tokenizer, tuned, given_adapter)
    if not given_adapter and (args.load_in_4bit or args.load_in_8bit):
        raise UsageError(
            "--load_in_4bit, --load_in_8bit: --tuned is a whole model, which is not quantized, and the rounding of "
            "the base would be taken for what fine-tuning did; leave the flag out, or give an adapter"
        )
    return PairSource(source.base, source.model_kwargs, source.tokenizer, tuned, given_adapter)


def blocks_of(model: Model) -> list[Block]:
    """The blocks of a model, named as in the base below its adapter.

    Raises:
        UsageError: If it has several stacks of them: an encoder-decoder.
    """
    blocks = select_blocks(model.get_base_model() if isinstance(model, PeftModel) else model)
    if len({block.stack for block in blocks}) > 1:
        raise UsageError(f"{type(model).__name__} has several stacks of blocks; only decoders can be analyzed.")
    return blocks


def _check_configs(base: str, tuned: str) -> None:
    ours, theirs = (_read_config(path, "--tuned").get_text_config() for path in (base, tuned))
    for name in _EQUAL_FIELDS:
        if getattr(ours, name) != getattr(theirs, name):
            raise UsageError(
                f"--tuned: {tuned!r} has {name}={getattr(theirs, name)!r} and the base {base!r} has "
                f"{getattr(ours, name)!r}; it must be a fine-tuned version of the base"
            )


def _check_tokenizers(tokenizer: PreTrainedTokenizerBase, tuned: str, given_adapter: bool) -> None:
    if (given_adapter or Path(tuned).is_dir()) and not (Path(tuned) / "tokenizer_config.json").is_file():
        logger.info("%s has no tokenizer: the base's is used", tuned)
    elif _read_tokenizer(tuned, "--tuned").get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"--tuned: {tuned!r} has another tokenizer than the base {tokenizer.name_or_path!r}: they do not read the "
            "same tokens. Give the base that it was trained from"
        )


def _read_config(path: str, flag: str) -> PreTrainedConfig:
    with error_context(flag, path, "is neither a directory with a config.json nor a hub id that can be reached"):
        return AutoConfig.from_pretrained(path)


def _read_tokenizer(path: str, flag: str) -> PreTrainedTokenizerBase:
    with error_context(flag, path, "has no tokenizer that can be loaded; save one beside the model"):
        return AutoTokenizer.from_pretrained(path)


def _load(path: str, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, **model_kwargs)
    keep_unpacked(model)
    if not getattr(model, "is_quantized", False):
        model.to(default_device())  # type: ignore[arg-type]  # transformers' decorator hides the signature
    return _frozen(model)


_M = TypeVar("_M", bound=nn.Module)


def _frozen(model: _M) -> _M:
    return model.eval().requires_grad_(False)
