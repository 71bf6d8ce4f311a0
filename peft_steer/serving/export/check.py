"""Whether what was written gives the adapter's log-probabilities, beside what a missing edit would give."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_steer.sites import select_blocks


TOKENS = 64
# Of the edit's own effect. Half precision rounds weights and sums elsewhere than the adapter does.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.1}
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Comparison:
    """The largest differences of log-probabilities, over all tokens and continuations.

    Attributes:
        error: Of what was written from the adapter.
        effect: Of the base from the adapter.
        dtype: What the model computes in.
    """

    error: float
    effect: float
    dtype: torch.dtype

    def __str__(self) -> str:
        text = (
            f"log-probabilities differ from the adapter's by {self.error:.1e} at most, the base's by {self.effect:.1e}"
        )
        if self.dtype in (torch.bfloat16, torch.float16):
            text += " (in half precision, whose rounding is part of it; --dtype float32 compares exactly)"
        return text

    def check(self) -> None:
        """Raises `ValueError` if the error is more than rounding."""
        if self.error > max(_ROUNDING[self.dtype], _TOLERANCE[self.dtype] * self.effect):
            raise ValueError(f"what was written is not the adapter: {self}. Nothing is kept; please report this")


def compare(written: PreTrainedModel | PeftModel, expected: torch.Tensor, base: torch.Tensor) -> Comparison:
    """Compares a model that has loaded what was written with the log-probabilities of the adapter and of the base."""
    error, effect = ((x - expected).abs().max().item() for x in (log_probs(written), base))
    return Comparison(error, effect, written.dtype)


@torch.no_grad()
def log_probs(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Of every token after every one of some random ones, `(1, tokens, vocabulary)`, as float32 or better."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (1, TOKENS), generator=generator).to(next(model.parameters()).device)
    logits = model(input_ids=ids).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@contextmanager
def acting(vectors: dict[int, torch.Tensor], model: nn.Module) -> Iterator[None]:
    """Within it `vectors`, `(d,)` by block, are added to the outputs of the blocks of `model`, as llama.cpp does."""
    with ExitStack() as hooks:
        for block in select_blocks(model):
            if block.index in vectors:
                v = vectors[block.index]

                def add(module, args, output, v=v):
                    h = output[0] if isinstance(output, tuple) else output
                    steered = h + v.to(h)
                    return (steered, *output[1:]) if isinstance(output, tuple) else steered

                hooks.callback(block.module.register_forward_hook(add).remove)
        yield


def without_adapter(model: PeftModel) -> torch.Tensor:
    """The same, of the base."""
    with model.disable_adapter():
        return log_probs(model)
