"""Greedy continuations of prompts, as texts."""

from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..inputs.pairs import Model
from ..inputs.texts import Texts


@torch.no_grad()
def continuations(model: Model, texts: Texts, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> Texts:
    """What `model` generates, greedily and with a cache, after each text's prompt: at most `new_tokens` tokens.

    Returns:
        The prompts with these answers. The prompt of a text without one is its first half.
    """
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    ends = sorted({tokenizer.eos_token_id, *configured} - {None})
    rows = []
    for batch in texts.batches("Generating"):
        lengths = [int(mask.sum()) for mask in batch.attention_mask]
        prompts = [int(mask.argmax()) for mask in batch.completion_mask]
        prompts = [n if n > 1 else max(1, length // 2) for n, length in zip(prompts, lengths, strict=True)]
        ids = [row[:n].tolist() for row, n in zip(batch.input_ids, prompts, strict=True)]
        width = max(prompts)
        padded = torch.tensor([[texts.pad] * (width - len(row)) + row for row in ids], device=batch.input_ids.device)
        present = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=padded.device)
        answers = cast(Any, model).generate(
            input_ids=padded,
            attention_mask=present,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=texts.pad,
            eos_token_id=ends,
        )[:, width:]
        rows += [(row + _until(answer, ends), len(row)) for row, answer in zip(ids, answers.tolist(), strict=True)]
    return Texts(rows, texts.batch_size, texts.pad, texts.device)


def _until(answer: list[int], ends: list[int]) -> list[int]:
    """`answer` up to and including its first end token."""
    return next((answer[: i + 1] for i, token in enumerate(answer) if token in ends), answer)
