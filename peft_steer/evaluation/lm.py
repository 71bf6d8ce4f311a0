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
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from peft_steer import needs_prompts
from peft_steer.utils.bitsandbytes import keep_unpacked
from peft_steer.utils.errors import UsageError

from .adapters import check, fingerprint, set_strength, take_off


@register_model("peft-steer")
class PeftSteerLM(HFLM):
    """`HFLM` with our tuner types registered, so that `peft=ADAPTER_DIR` loads them like any other adapter.

    Adapters whose `positions` refer to the prompt are told where each context ends. (`hf` does not tell them, and they
    raise.) On CPUs, and on several machines, `accelerate launch` divides the documents as `hf` does among the GPUs of
    one machine.

    Args:
        pretrained, kwargs: Those of `hf`.
        peft (`str`, *optional*): Path or Hub ID of an adapter, of any type that PEFT knows. [`load_adapter`] puts
            another one on the same base. (`peft-steer lm-eval` takes a list.)
        scale (`float`, *optional*): Strength of a steering, joint or LoRA adapter, as a factor of the one that it was
            trained with.

    Raises:
        UsageError: If `peft` is not a path, or `scale` is not finite or the adapter has no strength.
    """

    # While loglikelihoods are computed: the number of context tokens, by what the model is given.
    _context_lengths: dict[tuple[int, ...], int] | None = None
    _probing = False
    _model: Any  # with an adapter or without
    _fingerprint: dict[str, int] | None = None  # of the base below the present adapter

    def __init__(
        self,
        pretrained: str | PreTrainedModel | PeftModel,
        *args: Any,
        peft: str | None = None,
        scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        check(peft, scale)
        if peft and kwargs.get("delta"):
            raise UsageError("Cannot use both 'peft' and 'delta' options at the same time.")
        super().__init__(pretrained, *args, **kwargs)
        if hasattr(self, "accelerator"):  # set by `hf` if there are several processes
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if peft or scale is not None:
            self.load_adapter(peft, scale)

    def load_adapter(self, peft: str | None, scale: float | None = None) -> None:
        """Takes the present adapter off the base and puts another one on it.

        Args:
            peft: Path or Hub ID of the adapter, of any type; None for the base alone.
            scale: As in the constructor.

        Raises:
            UsageError: As in the constructor; or if the base is not what it was before the present adapter, which then
                has to be evaluated by itself.
        """
        check(peft, scale)
        self._model = take_off(self._model, self._fingerprint)
        self.peft = self._fingerprint = None
        if not peft:
            return
        embeddings = self._model.get_input_embeddings().num_embeddings
        if embeddings < len(self.tokenizer):  # `hf` would resize them, also where they are padded for speed
            raise ValueError(
                f"`peft={peft!r}`: the tokenizer has {len(self.tokenizer)} tokens and the base {embeddings} "
                "embeddings. Load the base with as many as the adapter was trained with (`pretrained=`)."
            )
        self._fingerprint = fingerprint(self._model)
        self._model = PeftModel.from_pretrained(self._model, peft, revision=self.revision).eval()
        self._model.tie_weights()
        self.peft = peft
        if scale is not None:
            set_strength(self._model, scale)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        # `hf` of lm-eval 0.4.13 passes these on as they are, which transformers 5 no longer takes.
        flags = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith(("load_in_", "bnb_", "llm_int8_"))}
        if flags.get("load_in_4bit") or flags.get("load_in_8bit"):
            kwargs["quantization_config"] = BitsAndBytesConfig(**flags)
        elif flags.keys() - {"load_in_4bit", "load_in_8bit"}:
            raise UsageError(f"{', '.join(flags)}: nothing is quantized without `load_in_4bit` or `load_in_8bit`")
        super()._create_model(*args, **kwargs)
        keep_unpacked(self._model)

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
                self._context_lengths = {}
                now: list[int] = []
                later: list[int] = []
                for i in waiting:
                    _, context, continuation = requests[i]
                    tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
                    n = len(tokens) + 1 - len(continuation)
                    same = self._context_lengths.setdefault(_unpadded(tokens), n) == n
                    (now if same else later).append(i)
                scored = super()._loglikelihood_tokens([requests[i] for i in now], disable_tqdm, override_bs)
                answers.update(zip(now, scored, strict=True))
                waiting = later
                if waiting and self.batch_size == "auto" and not override_bs:  # detected once is enough
                    override_bs = min(self.batch_sizes.values())
        finally:
            self._context_lengths = None
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if needs_prompts(self.model):
            raise UsageError(
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
            assert self._context_lengths is not None  # within `_loglikelihood_tokens`
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
