"""How far the trained model is from its base, on what it says itself: KL(trained | base) over its own tokens.

This is what reinforcement learning penalizes with `beta`, measured alike for every trainer, with `beta: 0` too.
"""

from typing import Any

import torch
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from peft_steer.evaluation.tasks import pair_of

from ..grid.plan import Cell
from .prompts import chat_of


@torch.no_grad()
def divergence(
    model: Any, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: ConfigurableTask, cell: Cell
) -> dict[str, float]:
    """Samples an answer to each of the first `cell.kl_prompts` evaluated prompts at temperature 1, by `cell.seed`.

    Args:
        model: The trained one.
        base: Before the training; it is not `model` with another name.
        tokenizer, task: The cell's.

    Returns:
        `kl`, nats per token: the mean over all sampled tokens of the divergence over the whole vocabulary;
        `kl_tokens`, how many these are.
    """
    docs = list(task.eval_docs)[: cell.kl_prompts]
    prompts = [_text(pair_of(task, doc, **chat_of(cell))[0], tokenizer) for doc in docs]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    added, tokenizer.pad_token = tokenizer.pad_token, tokenizer.pad_token or tokenizer.eos_token
    was_training = model.training
    model.eval()
    base.eval()
    set_seed(cell.seed)
    total, count = 0.0, 0
    try:
        for start in range(0, len(prompts), cell.eval_batch_size):
            texts = prompts[start : start + cell.eval_batch_size]
            batch = tokenizer(texts, return_tensors="pt", padding=True).to(base.device)
            kl, kept = _of_batch(model, base, tokenizer, batch, task.config.generation_kwargs.get("max_gen_toks", 256))
            total, count = total + (kl * kept).sum().item(), count + int(kept.sum())
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, added
        model.train(was_training)
    return {"kl": total / count, "kl_tokens": count}


def _of_batch(
    model: Any, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Any, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence at each sampled token `[n_rows, n_tokens]`, and which of them count: those up to the end."""
    drawn = model.generate(
        **batch,
        max_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    n_prompt = batch["input_ids"].shape[1]
    tokens = drawn.sequences[:, n_prompt:]
    ended = (tokens == tokenizer.eos_token_id).long().cumsum(dim=1)
    kept = (ended == 0) | ((ended == 1) & (tokens == tokenizer.eos_token_id))
    mask = torch.cat([batch["attention_mask"], kept.long()], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    before = base(input_ids=drawn.sequences, attention_mask=mask, position_ids=positions, use_cache=False)
    q = before.logits[:, n_prompt - 1 : -1].float().log_softmax(dim=-1)
    p = torch.stack(drawn.logits, dim=1).float().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1), kept


def _text(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt.rstrip()  # as the harness: the space is the answer's
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
