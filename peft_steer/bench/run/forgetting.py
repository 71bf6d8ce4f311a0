"""What a training cost elsewhere: the loss on plain text that it never saw."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_steer import needs_prompts


_WINDOW = 512


@torch.no_grad()
def text_loss(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, path: str) -> float:
    """Mean loss in nats per token on a text file, read in windows of 512 tokens (each predicts all but its first).

    A model whose edits depend on where a prompt ends takes each window for a prompt.
    """
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0].to(model.device)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for window in ids.split(_WINDOW):
        if len(window) < 2:
            continue
        prompts = {"prompt_lengths": torch.tensor([len(window)])} if needs_prompts(model) else {}
        logits = model(input_ids=window[None], use_cache=False, **prompts).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    model.train(was_training)
    return total / count
