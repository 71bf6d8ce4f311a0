"""Tiny models before and after fine-tuning, and texts for them."""

from pathlib import Path

import tiny
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_steer.analysis.command import main
from peft_steer.analysis.pairs import Pair
from peft_steer.analysis.texts import Texts


def tuned_by(model: torch.nn.Module, config: PeftConfig | None = None, std: float = 0.3) -> torch.nn.Module:
    """`model` with a random adapter, LoRA by default."""
    model = get_peft_model(model, config or LoraConfig(r=4, target_modules="all-linear"))
    tiny.randomize(model, std=std)
    return model.eval().requires_grad_(False)


def pair_of(architecture: str = "llama", config: PeftConfig | None = None, dtype=torch.float32) -> Pair:
    return Pair(tiny.make(architecture, dtype), tuned_by(tiny.make(architecture, dtype), config), tokenizer=None)


def some_texts(rows: int = 5) -> Texts:
    """Of different lengths, with token ids that every tiny model has."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, tiny.VOCAB - 1, (4 + i,), generator=generator).tolist() for i in range(rows)]
    return Texts([(row, 2) for row in ids], batch_size=2, pad=0, device="cpu")


def analyze(folder: Path, base: str, *words: str, config: PeftConfig | None = None, tuned: bool = True) -> int:
    """Runs `peft-steer analyze` on `base`, an adapter of it and a file of sums, into `folder / "out"`."""
    model = tuned_by(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder / "adapter")
    (folder / "sums.csv").write_text(
        "prompt,completion\n" + "".join(f"{a}+{b}=,{a + b}\n" for a in range(4) for b in range(4))
    )
    models = ["--base", base, *(["--tuned", str(folder / "adapter")] if tuned else [])]
    text = ["--dataset", str(folder / "sums.csv"), "--batch_size", "4"]
    return main([words[0], *models, *text, "--output", str(folder / "out"), *words[1:]])
