"""Where the prompts of one forward pass end, from what the model is called with."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from .spec import Layout


_HOW_TO_SAY = (
    "Pass the number of prompt tokens of each row to the model's forward as `prompt_lengths=`, or `labels` (or a "
    "`completion_mask`) that begin where the prompt ends. (transformers' Trainer takes the labels away where it has a "
    "`label_smoothing_factor` or a `compute_loss_func`: give it "
    "`data_collator=peft_steer.MarkCompletions(data_collator)`.)"
)


@dataclass(frozen=True)
class Generation:
    """What a call of `generate` was given: all of it is prompt.

    Args:
        prompt: `(batch, width)`, True at the tokens, False at padding.
    """

    prompt: torch.Tensor


def require(condition: torch.Tensor, message: str) -> None:
    """Raise `ValueError(message)` unless the boolean scalar `condition` holds (in a compiled forward pass a
    `RuntimeError`, when it runs)."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def cached_length(cache: Cache | None) -> int | torch.Tensor:
    """Number of tokens in the cache (with padding); a tensor if the cache is static.

    Raises:
        ValueError: if no layer of the cache knows it (linear attention alone).
    """
    if cache is None:
        return 0
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if cache.layers and not layers:
        raise ValueError(
            "`positions`: the cache of this model does not know how many tokens it has. Pass `use_cache=False`."
        )
    for layer in layers:  # those of linear attention, which may be the first ones, stay empty (MiniMax)
        past = layer.get_seq_length()
        if isinstance(past, torch.Tensor):
            return past.clone()
        if past:
            return past
    return 0


def tokens_of(inputs: dict[str, Any], names: tuple[str, ...] = ("input_ids", "inputs_embeds")) -> torch.Tensor:
    """The tensor of the pass's tokens, `(batch, tokens, ...)`.

    Raises:
        ValueError: if there is none.
    """
    x: torch.Tensor | None = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if x is None:
        raise ValueError(f"`positions` needs the model's tokens, as one of {', '.join(names)}.")
    return x


def during_generation(inputs: dict[str, Any], past: int | torch.Tensor, generation: Generation) -> Layout | None:
    """The layout of a forward pass within `generate`, whichever part of prompt and completion it is given; None if it
    begins after the prompt."""
    x = tokens_of(inputs)
    batch, tokens = x.shape[:2]
    prompt = generation.prompt.to(x.device)
    width = prompt.shape[1]
    if inputs.get("past_key_values") is None and tokens < width:
        raise ValueError(
            "`positions`: this model generates without a key-value cache of transformers and without being given the "
            "whole sequence, so the tokens' positions are unknown. Pass `use_cache=False` to `generate`."
        )
    if batch % len(prompt):
        raise ValueError(f"`positions`: `generate` was given {len(prompt)} rows and calls the model with {batch}.")
    if not isinstance(past, torch.Tensor) and past >= width:
        return None
    length = prompt.sum(1, keepdim=True)
    columns = past + torch.arange(tokens, device=x.device)
    after = columns - width  # of generated tokens; negative in the prompt
    at = columns.clamp(max=width - 1)
    index = torch.where(after < 0, (prompt.cumsum(1) - 1)[:, at], length + after)
    valid = prompt[:, at] | (after >= 0)
    repeats = batch // len(prompt)  # beams, returned sequences
    return Layout(*(t.repeat_interleave(repeats, 0) for t in (index, length.expand_as(index), valid)))


def of_whole_prompts(inputs: dict[str, Any]) -> Layout:
    """The layout where every token is of the prompt: an encoder's."""
    valid, _ = _valid(inputs, tokens_of(inputs), 0)
    return Layout(valid.cumsum(1) - 1, valid.sum(1, keepdim=True).expand_as(valid), valid)


def of_whole_completions(inputs: dict[str, Any]) -> Layout | None:
    """The layout where every token is of the completion: the decoder's in an encoder-decoder model."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if labels is not None and inputs.get("decoder_input_ids") is None:
        mask = labels != -100
    if mask is None or inputs.get("past_key_values") is not None:
        return None
    zeros = torch.zeros_like(mask, dtype=torch.long)
    return Layout(zeros, zeros, mask > 0)


def of_call(inputs: dict[str, Any], past: int | torch.Tensor, generates: bool) -> Layout:
    """The layout of a forward pass outside `generate`.

    Where the prompt ends is told by, in this order: `prompt_lengths`, one for each row (of a packed batch, for each
    sequence, in order); `completion_mask` or `labels`, whose first token that is not 0 or -100 is the completion's
    first (without gaps in the labels, which would show several prompts); if the model does not generate (a
    classifier), everything is prompt.

    Args:
        inputs: the arguments of `forward`, by name.
        past: number of tokens in the cache before the pass.
        generates: whether the model has `generate`.

    Raises:
        ValueError: if none of them tells, or they contradict the other arguments.
    """
    x = tokens_of(inputs)
    valid, index = _valid(inputs, x, past)
    begins = None if isinstance(past, torch.Tensor) or past else _sequence_begins(inputs, valid)
    lengths = inputs.get("prompt_lengths")
    marks = _completion_marks(inputs, valid, generates)
    if lengths is None and marks is None and generates:
        raise ValueError(
            f"`positions` refers to the prompt, and nothing tells where it ends in this forward pass. {_HOW_TO_SAY} "
            "(`generate` knows by itself. lm-evaluation-harness: use `--model peft-steer`.)"
        )
    if begins is None:
        if lengths is None:
            raise ValueError(f"`positions`: with a filled cache, `labels` do not tell the prompt's end. {_HOW_TO_SAY}")
        return Layout(index, _given(lengths, len(valid), x.device)[:, None].expand_as(index), valid)

    # Sequences are numbered through the flattened batch; padding belongs to one number more, which is dropped.
    n = valid.numel()
    count = valid.flatten().cumsum(0)
    sequence = torch.where(valid.flatten(), begins.flatten().cumsum(0) - 1, n)
    first = count.new_full((n + 1,), n).scatter_reduce(0, sequence, count, "amin")
    index = torch.where(valid.flatten(), count - first[sequence], -1)
    total = count.new_zeros(n + 1).scatter_add(0, sequence, valid.flatten().to(count.dtype))
    packed = begins.sum() > len(begins)
    if lengths is not None:
        length = _pad(_given(lengths, None, x.device), n + 1)
        sequences = begins.sum()
        require(
            sequences == len(lengths),
            f"`prompt_lengths` has {len(lengths)} entries; the forward pass has another number of sequences.",
        )
        if inputs.get("past_key_values") is None:  # with one, the prompt may come in parts
            require((length <= total).all(), "`prompt_lengths` has a prompt that is longer than its sequence.")
    elif marks is not None:
        where = torch.where(marks.flatten(), sequence, n)
        length = torch.minimum(count.new_full((n + 1,), n).scatter_reduce(0, where, index, "amin"), total)
        if inputs.get("completion_mask") is None:
            last = count.new_full((n + 1,), -1).scatter_reduce(0, where, index, "amax")
            labelled = count.new_zeros(n + 1).scatter_add(0, where, torch.ones_like(where))
            require(
                ((labelled == 0) | (last - length + 1 == labelled))[:n].all(),
                "`labels` begin more than once in a sequence: several turns, or sequences joined without "
                "`position_ids` (TRL's `packing_strategy='wrapped'`), so a prompt may end at any of them. Give the "
                f"last turn alone as the completion, or pack with 'bfd'. {_HOW_TO_SAY}",
            )
        # TRL's and transformers' collators mask the first label of every packed sequence: that shows no prompt.
        length = torch.where(packed & (length == 1), 0, length)
        padding = packed & (total[sequence] == 1)  # to a multiple, without an attention mask
        valid = valid & ~padding.view(valid.shape)
        require(
            (length[:n] > 0).any(),
            f"`labels` begin with the sequences: no sequence of this batch has a prompt to steer. {_HOW_TO_SAY} "
            "Or choose `positions='all'`.",
        )
    else:
        length = total
    return Layout(index.view(valid.shape), length[sequence].view(valid.shape), valid)


def _valid(inputs: dict[str, Any], x: torch.Tensor, past: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pass's tokens are not padding, and how many tokens of their row precede them, both `(batch,
    tokens)`."""
    batch, tokens = x.shape[:2]
    mask = inputs.get("attention_mask")
    if mask is None:
        index = (past + torch.arange(tokens, device=x.device)).expand(batch, tokens)
        return torch.ones(batch, tokens, dtype=torch.bool, device=x.device), index
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] < tokens:
        raise ValueError(
            "`positions` needs a two-dimensional `attention_mask` (batch, tokens), which shows the padding."
        )
    attended = mask.to(x.device) > 0
    return attended[:, -tokens:], (attended.cumsum(1) - 1)[:, -tokens:]


def _sequence_begins(inputs: dict[str, Any], valid: torch.Tensor) -> torch.Tensor:
    """Where a sequence begins, `(batch, tokens)`: at each row's first token; packed, wherever `position_ids`
    restart."""
    first = valid & (valid.cumsum(1) == 1)
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        if inputs.get("cu_seq_lens_q") is not None or inputs.get("seq_idx") is not None:
            raise ValueError("`positions` needs the `position_ids` of packed sequences, which restart at 0 in each.")
        return first
    if position_ids.ndim != 2:
        raise ValueError("`positions` needs `position_ids` of shape (batch, tokens), or none.")
    begins: torch.Tensor = valid & (position_ids.to(valid.device) == 0)
    require(
        (begins | ~first).all(),
        "`positions`: `position_ids` do not begin at 0, so this is a part of a longer sequence, whose beginning is "
        "unknown here.",
    )
    return begins


def _completion_marks(inputs: dict[str, Any], valid: torch.Tensor, generates: bool) -> torch.Tensor | None:
    """Tokens marked as of the completion, `(batch, tokens)`, or None if nothing marks them."""
    mask, labels = inputs.get("completion_mask"), inputs.get("labels") if generates else None
    marks: torch.Tensor | None = mask > 0 if mask is not None else labels != -100 if labels is not None else None
    if marks is None:
        return None
    if marks.shape != valid.shape:
        raise ValueError(
            f"`positions`: labels or completion mask of shape {tuple(marks.shape)} do not show where prompts end in "
            f"tokens of shape {tuple(valid.shape)}. {_HOW_TO_SAY}"
        )
    return marks.to(valid.device) & valid


def _given(lengths: Any, rows: int | None, device: torch.device) -> torch.Tensor:
    given = torch.as_tensor(lengths, device=device)
    if given.ndim != 1 or given.is_floating_point() or (rows is not None and len(given) != rows):
        raise ValueError(f"`prompt_lengths` must have one integer for each sequence; got {given.tolist()}.")
    require((given >= 0).all(), "`prompt_lengths` must not be negative.")
    return given


def _pad(lengths: torch.Tensor, n: int) -> torch.Tensor:
    """`lengths` with zeros behind, `(n,)`."""
    return torch.nn.functional.pad(lengths[:n], (0, n - min(n, len(lengths))))
