"""Which tokens are steered, written plainly."""

import torch
from peft import get_peft_model
from tiny import METHODS, VOCAB, make, randomize, steer_layers

from peft_steer import steered_positions


SPECS = ("last", "f7+l7", "f2", "l3", "f1+l2", "prompt", "completion")
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def expected(spec: str, prompt: int, total: int) -> list[bool]:
    """The steered tokens of one sequence, by the definitions in words."""
    if spec == "prompt":
        return [i < prompt for i in range(total)]
    if spec == "completion":
        return [i >= prompt for i in range(total)]
    if spec == "last":
        return [i == prompt - 1 for i in range(total)]
    chosen = set()
    for part in spec.split("+"):
        count = min(int(part[1:]), prompt // 2)
        chosen |= set(range(count)) if part[0] == "f" else set(range(prompt - count, prompt))
    return [i in chosen for i in range(total)]


def steered(architecture="llama", method="steer", **config):
    model = get_peft_model(make(architecture), METHODS[method](**{"r": 4, "kind": "nonlinear", **config}))
    randomize(model, std=0.5)
    return model.eval()


def mask_of(model) -> torch.Tensor:
    """The mask that every layer has applied; all of them the same."""
    masks = [layer.steered for layer in steer_layers(model).values()]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert steered_positions(model) == int(masks[0].sum())
    return masks[0]


def tokens(*lengths: int, side="right", seed=0):
    """A padded batch; `(input_ids, attention_mask)`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        part = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, part] = torch.randint(3, VOCAB - 1, (n,), generator=generator)
        mask[row, part] = 1
    return ids, mask
