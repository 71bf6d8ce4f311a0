"""A task's score of a model, as lm-eval has it."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer.bench.run.cell import _of_items
from peft_steer.evaluation.lm import PeftSteerLM
from peft_steer.evaluation.scoring import score
from peft_steer.evaluation.tasks import load_task


@pytest.mark.parametrize("limit", [1, 7])
def test_score(tiny_llama, limit):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    harness = PeftSteerLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = score(harness, load_task("listops_short")[0], limit)
    scores = found["items"]["scores"]
    assert (found["metric"], found["n"], len(scores)) == ("acc", limit, limit)
    assert found["score"] == sum(scores) / limit
    assert len(set(found["items"]["ids"])) == limit
    if limit == 1:
        assert found["stderr"] is None  # lm-eval says "N/A"
    else:
        variance = sum((x - found["score"]) ** 2 for x in scores) / (limit - 1)
        assert found["stderr"] == pytest.approx((variance / limit) ** 0.5)


def test_metrics_of_a_corpus_cannot_be_compared_by_items():
    with pytest.raises(ValueError, match="translate: its metric 'bleu' scores a whole corpus"):
        _of_items({"metric": "bleu", "items": {"scores": [(["a"], "b")]}}, "translate")
