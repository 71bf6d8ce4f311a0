"""Trainings of edits at heads, with plain SGD and by TRL."""

import torch
from sft import sft_trainer
from tiny import steer_layers
from transformers import AutoModelForCausalLM

from peft_steer import SteerConfig


def edits(model, name="default"):
    return [layer.steer_edit[name] for layer in steer_layers(model.get_base_model()).values()]


def sgd(model, lr=0.5):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def sft(tiny_llama, output, resume=None, **config):
    trainer = sft_trainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"),
        tiny_llama,
        output,
        SteerConfig(site="heads", task_type="CAUSAL_LM", **config),
        save_steps=2,
        learning_rate=0.02,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
