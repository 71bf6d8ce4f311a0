"""Adapters in a folder, far from the base."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM


def save_adapter(model_path: str, config, folder: Path) -> str:
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # far from the base, so that no score can agree by chance
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 1.0)
    model.save_pretrained(folder)
    return str(folder)
