"""What a strength does: to the odds of positive against negative answers, to a text's distance from the base, to a
task's score."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lm_eval.api.task import ConfigurableTask
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from peft_steer import SteerModel
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score

from .pairs import Pair, Text


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effect:
    """At one strength.

    Attributes:
        scale: The strength.
        log_odds, log_odds_stderr: Mean over held-out pairs of `log p(positive | prompt) - log p(negative | prompt)`,
            in nats, and its standard error; None where pairs have no prompt.
        shift, shift_stderr: The same of each pair's difference from strength 0.
        kl: Mean divergence of the steered model's next token from the base's, on the held-out texts, in nats: the
            price.
        score, stderr: The task's; None without a task.
    """

    scale: float
    log_odds: float | None
    log_odds_stderr: float | None
    shift: float | None
    shift_stderr: float | None
    kl: float | None
    score: float | None = None
    stderr: float | None = None


def effects(
    model: PeftModel,
    scales: Sequence[float],
    held_out: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    task: ConfigurableTask | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[Effect]:
    """The effect of every strength in `scales`, on held-out pairs and on the evaluated split of `task`. The adapter's
    strength is what it was afterwards."""
    measured = []
    tuner = cast(SteerModel, model.base_model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # that the model is an object is meant
    harness = None if task is None else PeftSteerLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with model.disable_adapter():
        odds_0 = _log_odds(model, held_out)
    for number, scale in enumerate(tqdm(scales, desc="Strengths", delay=2, disable=task is not None), 1):
        tuner.set_scale("default", scale)
        odds = _log_odds(model, held_out)
        result: dict[str, Any] = {}
        if task is not None:
            logger.info("%s with strength %g (%d of %d)", task.config.task, scale, number, len(scales))
            scored = score(harness, task, limit)
            result = {"score": scored["score"], "stderr": scored["stderr"]}
        measured.append(
            Effect(
                scale,
                *_mean(odds),
                *_mean(None if odds is None or odds_0 is None else odds - odds_0),
                _kl(model, [text for pair in held_out for text in (pair.positive, pair.negative)]),
                **result,
            )
        )
    tuner.set_scale("default", 1.0)
    return measured


def best(measured: Sequence[Effect], higher_is_better: bool = True) -> Effect:
    """The one with the best score; of equals the weakest. All must have a score."""
    sign = 1 if higher_is_better else -1
    return max(measured, key=lambda effect: (sign * cast(float, effect.score), -abs(effect.scale)))


def _mean(x: torch.Tensor | None) -> tuple[float | None, float | None]:
    if x is None:
        return None, None
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else float("nan")


def _log_odds(model: PeftModel, pairs: Sequence[Pair]) -> torch.Tensor | None:
    """`log p(positive | prompt) - log p(negative | prompt)` of each pair, `(pairs,)`."""
    if not pairs or not all(pair.has_prompt for pair in pairs):
        return None
    return torch.stack([_log_p(model, pair.positive) - _log_p(model, pair.negative) for pair in pairs])


@torch.no_grad()
def _log_p(model: PeftModel, text: Text) -> torch.Tensor:
    log_probs = _log_probs(model, text)[:-1]
    ids = torch.tensor(text.ids[1:], device=log_probs.device)
    return log_probs.gather(-1, ids[:, None])[text.start - 1 :].sum().double().cpu()


@torch.no_grad()
def _kl(model: PeftModel, texts: Sequence[Text]) -> float | None:
    if not texts:
        return None
    total = tokens = 0.0
    for text in texts:
        steered = _log_probs(model, text)
        with model.disable_adapter():
            base = _log_probs(model, text)
        total += (steered.exp() * (steered - base)).sum().item()
        tokens += len(text.ids)
    return total / tokens


def _log_probs(model: PeftModel, text: Text) -> torch.Tensor:
    """Of the next token after each of the text's, `(tokens, vocabulary)`, in float32."""
    ids = torch.tensor([text.ids], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
