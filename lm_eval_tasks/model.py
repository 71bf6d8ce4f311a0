"""The harness model `peft-steer`: lm-eval's `hf`, knowing our adapters.

lm-eval 0.4.13 finds it once this module is imported (`peft-steer lm-eval` does so); newer versions find it by the
entry point `lm_eval.models`:

    lm_eval --model peft-steer --model_args pretrained=MODEL,peft=DIR --include_path lm_eval_tasks --tasks listops
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import BitsAndBytesConfig

from peft_steer import needs_prompts  # (importing the package registers the tuner types, which `hf` lacks)


@register_model("peft-steer")
class PeftSteerLM(HFLM):
    """`HFLM` with our tuner types registered, so that `peft=ADAPTER_DIR` loads them like any other adapter.

    Adapters whose `positions` refer to the prompt are told where each context ends. (`hf` does not tell them, and they
    raise.)
    """

    # While loglikelihoods are computed: the number of context tokens, by what the model is given.
    _context_lengths: dict[tuple[int, ...], int] | None = None
    _probing = False

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        # `hf` of lm-eval 0.4.13 passes these on as they are, which transformers 5 no longer takes.
        flags = {
            k: kwargs.pop(k) for k in list(kwargs) if k in ("load_in_4bit", "load_in_8bit") or k.startswith("bnb_")
        }
        if flags:
            kwargs["quantization_config"] = BitsAndBytesConfig(**flags)
        super()._create_model(*args, **kwargs)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.backend != "causal" or not needs_prompts(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        waiting = list(range(len(requests)))
        try:
            while waiting:
                # Requests that give the model the same tokens, as context and continuation divided differently, are
                # different requests: the harness would run the model once for all of them.
                self._context_lengths, now, later = {}, [], []
                for i in waiting:
                    _, context, continuation = requests[i]
                    tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
                    n = len(tokens) + 1 - len(continuation)
                    same = self._context_lengths.setdefault(_unpadded(tokens), n) == n
                    (now if same else later).append(i)
                found = super()._loglikelihood_tokens([requests[i] for i in now], disable_tqdm, override_bs)
                answers.update(zip(now, found, strict=True))
                waiting = later
        finally:
            self._context_lengths = None
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if needs_prompts(self.model):
            raise ValueError(
                "A rolling loglikelihood (perplexity) has no prompt, to which the adapter's `positions` refer. Train "
                "it with `positions='all'`, or evaluate it on other tasks."
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        self._probing = True
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            self._probing = False

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.backend != "causal" or not needs_prompts(self.model):
            return super()._model_call(inps, attn_mask, labels)
        if self._probing:  # for memory: any tokens, whose logits nobody reads
            lengths = [inps.shape[1]] * len(inps)
        else:
            lengths = [self._context_lengths[_unpadded(row)] for row in inps.tolist()]
        handle = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "prompt_lengths": lengths}), with_kwargs=True
        )
        try:
            return super()._model_call(inps, attn_mask, labels)
        finally:
            handle.remove()


def _unpadded(tokens: list[int]) -> tuple[int, ...]:
    """Without the zeros at the end, with which the harness pads."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])
