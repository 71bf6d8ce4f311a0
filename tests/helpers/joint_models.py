"""Tiny models with a joint adapter, and what is asked of them in several tests."""

import torch
from peft import get_peft_model
from tiny import inputs, make

from peft_steer import JointSteerLoraConfig, orthogonality


TOLERANCE = 1e-5


MODES = {
    "always": {"orthogonal": "always"},
    "periodic": {"orthogonal": "periodic", "orthogonal_interval": 2},
    "none": {"orthogonal": "none"},
}


def joint(architecture="llama", dtype=torch.float32, **config):
    config = {"r": 4, "steer_r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(make(architecture, dtype), JointSteerLoraConfig(**config)).eval()


def train(model, steps=4, lr=0.01, **options):
    x = inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    for _ in range(steps):
        model(**x, labels=x["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def worst(model, name="default"):
    return max(orthogonality(model, name).values())


def by_qr(W, B):
    Q, _ = torch.linalg.qr(B.double())
    return W.double() - (W.double() @ Q) @ Q.T
