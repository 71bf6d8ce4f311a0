"""Hidden states at one place of every chosen block, streamed: of each text one vector is kept."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_steer.sites import Block, site_module

from .pairs import Text


TOKENS = ("last", "mean")


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    texts: Sequence[Text],
    blocks: Sequence[Block],
    site: str = "block",
    tokens: str = "last",
    batch_size: int = 8,
) -> dict[int, torch.Tensor]:
    """The states of `texts`, `(texts, d)` in float32 on the CPU, by block.

    Args:
        model: The base, quantized or not.
        texts: What to run it on.
        blocks: Blocks of `model`.
        site: Where in a block, as in `SteerConfig`.
        tokens: `"last"`: the state at a text's last token; `"mean"`: the mean over its span.
        batch_size: Texts at a time. Texts of similar length are run together.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens={tokens!r} must be one of {', '.join(map(repr, TOKENS))}")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    kept: dict[int, list] = {block.index: [None] * len(texts) for block in blocks}
    seen: dict[int, torch.Tensor] = {}
    device = cast(nn.Embedding, model.get_input_embeddings()).weight.device
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as hooks:
        for block in blocks:
            module = site_module(block, site)[1]
            handle = _register(module, site == "heads", seen, block.index)
            hooks.callback(handle.remove)
        hooks.callback(_set_modes, modes)
        model.eval()
        starts = range(0, len(texts), batch_size)
        for start in tqdm(starts, desc=f"States at {site!r}", unit="batch", delay=2):
            chosen = order[start : start + batch_size]
            ids, mask, span = _batch([texts[i] for i in chosen], tokens)
            model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for index, h in seen.items():
                weight = span.to(h.device, torch.float32)
                means = torch.einsum("ntd,nt->nd", h.float(), weight / weight.sum(1, keepdim=True)).cpu()
                for row, i in enumerate(chosen):
                    kept[index][i] = means[row]
    return {index: torch.stack(rows) for index, rows in kept.items()}


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def _register(module: nn.Module, at_input: bool, seen: dict[int, torch.Tensor], index: int):
    def keep_output(module, args, output):
        seen[index] = output[0] if isinstance(output, tuple) else output

    def keep_input(module, args):
        seen[index] = args[0]

    return module.register_forward_pre_hook(keep_input) if at_input else module.register_forward_hook(keep_output)


def _batch(texts: list[Text], tokens: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids padded on the right, which a causal model does not see; the attention mask; and what is read."""
    longest = max(len(text.ids) for text in texts)
    ids, mask, span = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
    for row, text in enumerate(texts):
        n = len(text.ids)
        ids[row, :n] = torch.tensor(text.ids)
        mask[row, :n] = 1
        span[row, (text.start if tokens == "mean" else n - 1) : n] = 1
    return ids, mask, span
