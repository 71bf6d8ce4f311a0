"""What is timed: training steps and decoding, of all models in turn, so that a busy machine slows all of them."""

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocator import peak_bytes


@contextmanager
def checkpointing(model: PeftModel, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing of every block while the context lasts, if `enabled`.

    Gradients still stop at the lowest adapter: transformers makes the embeddings' output require a gradient, which
    non-reentrant checkpointing does not need and which is undone here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers has another name for it
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()
        try:
            yield
        finally:
            if enabled:
                model.gradient_checkpointing_disable()


def training_step(model: PeftModel, batch: Mapping[str, Any]) -> Callable[[], None]:
    """A function that runs forward, backward and an AdamW step of the adapter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_peak(model: PeftModel, batch: Mapping[str, Any]) -> int:
    """Peak bytes of the first training step: the weights and all that is allocated beside them, Adam's moments too."""
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    return weights + peak_bytes(lambda: training_step(model, batch)(), model.device)


def greedy_decoding(model: PreTrainedModel | PeftModel, prompt: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """A function that generates `new_tokens` tokens with the KV cache."""

    def decode() -> None:
        model.eval()
        cast(Any, model).generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return decode


def interleaved_seconds(
    functions: Mapping[str, Callable[[], None]], rounds: int, device: torch.device, seed: int, label: str
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round to warm up; every round has a new random order.

    On a CPU they are this process's processor time, which other processes on a shared machine do not lengthen; on an
    accelerator, elapsed time.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    names, order = list(functions), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in tqdm(range(rounds + 1), desc=label, leave=False):
        order.shuffle(names)
        for name in names:
            _synchronize(device)
            start = clock()
            functions[name]()
            _synchronize(device)
            if round_index:
                seconds[name].append(clock() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
