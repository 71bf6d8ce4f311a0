"""How far a model's predictions are from another's, over streamed text."""

from dataclasses import dataclass, field

import torch

from ..inputs.texts import Batch


@dataclass
class Distance:
    """KL divergence `KL(reference || model)` of next-token distributions, in nats a token, and how often both have
    the same first choice. Over every token of the text, and over the predictions of its answers alone."""

    _sums: dict[str, list[float]] = field(default_factory=lambda: {"": [0.0, 0.0, 0], "_answer": [0.0, 0.0, 0]})

    def add(self, batch: Batch, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """`reference`, `logits`: `(rows, tokens, vocabulary)`."""
        for suffix, where in (("", batch.tokens), ("_answer", batch.predicts_answer)):
            sums = self._sums[suffix]
            for chosen, p, q in zip(where, reference, logits, strict=True):  # a row at a time: vocabularies are large
                log_p, log_q = (x[chosen].float().log_softmax(-1) for x in (p, q))
                sums[0] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
                sums[1] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
                sums[2] += len(log_p)

    def summary(self) -> dict[str, float]:
        """`kl`, `agreement` and `tokens`, and the same of answers with the suffix `_answer`."""
        return {
            f"{name}{suffix}": value
            for suffix, (kl, same, n) in self._sums.items()
            for name, value in (("kl", kl / n), ("agreement", same / n), ("tokens", n))
        }
