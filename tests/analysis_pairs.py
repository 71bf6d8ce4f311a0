"""Tiny bases, what fine-tuning may have made of them, and text for both."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from tiny import BASES, VOCAB, randomize
from torch import nn
from transformers import AutoModelForCausalLM

from peft_steer import PostBlockSteerConfig, SteerConfig
from peft_steer.analysis.pairs import blocks_of
from peft_steer.analysis.texts import Texts


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "post_block": PostBlockSteerConfig(r=2, task_type="CAUSAL_LM"),
    "mlp": SteerConfig(site="mlp", kind="linear", r=2, use_bias=True, task_type="CAUSAL_LM"),
}


def random_texts(rows: int = 12, length: int = 9, seed: int = 0, batch_size: int = 4) -> Texts:
    """Random tokens in rows of different lengths, the first two of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 1, (rows, length), generator=generator).tolist()
    return Texts([(row[: length - i % 4], 2) for i, row in enumerate(ids)], batch_size, 0, "cpu")


def tuned_blocks(base: nn.Module, std: float = 0.05) -> nn.Module:
    """A copy with other weights in every block."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in blocks_of(tuned):
            for p in block.module.parameters():
                p.add_(std * torch.randn(p.shape, generator=generator))
    return tuned


def with_adapter(base: nn.Module, name: str) -> nn.Module:
    """A copy of `base` with a random adapter."""
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(ADAPTERS[name]))
    randomize(model, std=0.3)
    return model.eval().requires_grad_(False)


def save_pair(folder: str, target, name: str) -> str:
    """The folder of a random adapter of the model in `folder`, or, with the name `"full"`, of a whole model."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = tuned_blocks(base) if name == "full" else with_adapter(base, name)
    model.save_pretrained(target)
    return str(target)


def load_quantized(folder: str, base: str) -> nn.Module:
    """The model in `folder` in one of `tiny.BASES`' precisions."""
    return AutoModelForCausalLM.from_pretrained(folder, **BASES[base]).eval().requires_grad_(False)
