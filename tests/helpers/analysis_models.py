"""Tiny bases, what fine-tuning may have made of them, text for both, and the command on them."""

import copy
from pathlib import Path

import torch
from command_line import peft_steer
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import BASES, VOCAB, make, randomize
from torch import nn
from transformers import AutoModelForCausalLM

from peft_steer import PostBlockSteerConfig, SteerConfig
from peft_steer.analysis.inputs.pairs import Pair, blocks_of
from peft_steer.analysis.inputs.texts import Texts
from peft_steer.utils.bitsandbytes import keep_unpacked


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


def with_adapter(base: nn.Module, adapter: str | PeftConfig = "lora", std: float = 0.3) -> PeftModel:
    """A copy of `base` with a random adapter: one of `ADAPTERS`, or of a configuration."""
    config = ADAPTERS[adapter] if isinstance(adapter, str) else adapter
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    randomize(model, std=std)
    return model.eval().requires_grad_(False)


def pair_of(architecture: str = "llama", adapter: str | PeftConfig = "lora") -> Pair:
    """A tiny base, and a copy with a random adapter."""
    base = make(architecture)
    return Pair(base, with_adapter(base, adapter), tokenizer=None)


def save_tuned(folder: str, target: Path, adapter: str | PeftConfig) -> str:
    """The folder of a random adapter of the model in `folder`, or, with the name `"full"`, of a whole model."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = tuned_blocks(base) if adapter == "full" else with_adapter(base, adapter)
    model.save_pretrained(target)
    return str(target)


def load_quantized(folder: str, base: str) -> nn.Module:
    """The model in `folder` in one of `tiny.BASES`' precisions."""
    model = AutoModelForCausalLM.from_pretrained(folder, **BASES[base]).eval().requires_grad_(False)
    keep_unpacked(model)
    return model


def analyze(folder: Path, base: str, *words: str, adapter: str | PeftConfig | None = "lora") -> int:
    """Runs `peft-steer analyze` on `base`, an adapter of it if any and a file of sums, into `folder / "out"`. The
    adapter and the sums are made once: a second run can go on where the first stopped."""
    sums, tuned = folder / "sums.csv", folder / (adapter if isinstance(adapter, str) else "adapter")
    if not sums.exists():
        sums.write_text("prompt,completion\n" + "".join(f"{a}+{b}=,{a + b}\n" for a in range(4) for b in range(4)))
    if adapter and not tuned.exists():
        save_tuned(base, tuned, adapter)
    models = ["--base", base, *(["--tuned", str(tuned)] if adapter else [])]
    text = ["--dataset", str(sums), "--batch_size", "4"]
    return peft_steer("analyze", words[0], *models, *text, "--output", str(folder / "out"), *words[1:])
