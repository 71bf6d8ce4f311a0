"""A check before the first training step: the adapter really acts, and the loss is finite."""

import logging
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from peft_steer import steered_modules
from peft_steer.utils.bitsandbytes import keep_unpacked

from .rollouts import check_followed


logger = logging.getLogger(__name__)
_TOKENS = 32


def preflight(trainer: Trainer, text: str) -> None:
    """Prints what is trained, after a forward pass on a few tokens with the adapter as it is and one with its weights
    shaken. Nothing is left changed, the state of the random generators included.

    Args:
        trainer: any of TRL's, before `train()`.
        text: whose first 32 tokens are the input.

    Raises:
        RuntimeError: if nothing is trained, if the loss is not finite, if the adapter's weights change no logits, or
            if vLLM generates for a steered model that it does not follow.
    """
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise RuntimeError("Pre-flight: nothing is trained, no parameter requires a gradient.")
    if followed := check_followed(trainer):
        logger.info("Pre-flight: vLLM's rollouts follow %d edits.", followed)
    blocks = steered_modules(model)
    if trainer.accelerator.device.type != model.device.type or _is_zero3(trainer):
        logger.warning(
            "Pre-flight: %d steered modules. No forward pass is tried: the model is not yet in place.", len(blocks)
        )
        return
    n = sum(p.numel() for p in trained.values())
    logger.info("Pre-flight: %d steered modules, %s trainable parameters.", len(blocks), f"{n:,}")
    ids = tokenizer(text=text, return_tensors="pt").input_ids[:, :_TOKENS].to(model.device)
    ids = ids.repeat(1, 2)  # never a single token
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100  # a prompt and a completion, for adapters that steer one of them
    keep_unpacked(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before = model(input_ids=ids, labels=labels)
            if not before.loss.isfinite():
                raise RuntimeError(f"Pre-flight: the loss is {before.loss.item()} before the first step.")
            if isinstance(model, PeftModel) and not _acts(model, trained, before.logits, input_ids=ids, labels=labels):
                raise RuntimeError(
                    "Pre-flight: the logits do not change with the adapter's weights: it would train nothing. Is it "
                    "disabled or merged, or do its target modules take no part in the forward pass?"
                )
    finally:
        model.train(training)


def _is_zero3(trainer: Trainer) -> bool:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3  # which has already taken the parameters apart


def _acts(model: PeftModel, trained: dict[str, torch.nn.Parameter], logits: torch.Tensor, **batch) -> bool:
    generator = torch.Generator().manual_seed(0)
    kept = {name: p.detach().clone() for name, p in trained.items()}
    try:
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
        return not torch.equal(model(**batch).logits, logits)
    finally:
        for name, p in trained.items():
            p.copy_(kept[name])
