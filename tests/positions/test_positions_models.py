"""Positions on other classes of models: classifiers, encoders, a decoder beside an encoder."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from positions_reference import GREEDY, expected, mask_of, steered, tokens
from tiny import (
    SMALL,
    make,
)
from training import gradients

from peft_steer import SteerConfig, steered_positions


@pytest.mark.parametrize("spec", ["f2+l1", "last", "prompt"])
def test_classifiers_have_nothing_but_a_prompt(spec):
    ids, mask = tokens(9, 6)
    config = tf.LlamaConfig(**SMALL, num_labels=2)
    for base in (make("bert"), tf.LlamaForSequenceClassification(config).eval()):
        model = get_peft_model(base, SteerConfig(r=4, kind="nonlinear", positions=spec))
        model(input_ids=ids, attention_mask=mask)
        want = torch.zeros_like(mask, dtype=torch.bool)
        want[0], want[1, :6] = torch.tensor(expected(spec, 9, 9)), torch.tensor(expected(spec, 6, 6))
        assert torch.equal(mask_of(model), want)


@pytest.mark.parametrize("spec", ["f2+l1", "last", "prompt"])
def test_an_encoder_has_the_prompt(spec):
    model = steered("t5", positions=spec, target_modules=r"encoder\.block\.\d+")
    ids, mask = tokens(9, 6)
    model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4])
    want = torch.zeros_like(mask, dtype=torch.bool)
    want[0], want[1, :6] = torch.tensor(expected(spec, 9, 9)), torch.tensor(expected(spec, 6, 6))
    assert torch.equal(mask_of(model), want)
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(mask_of(model), want)
    for row, n in enumerate((9, 6)):
        assert torch.equal(model.generate(input_ids=ids[row : row + 1, :n], **GREEDY)[0], together[row])


def test_a_decoder_beside_an_encoder_has_the_completion():
    model = steered("t5", positions="completion", target_modules=r"decoder\.block\.\d+")
    ids, mask = tokens(9, 6)
    labels = torch.tensor([[5, 6, 7, 2], [5, 2, -100, -100]])
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert mask_of(model).tolist() == [[True] * 4, [True, True, False, False]]
    assert all(g.abs().sum() > 0 for g in gradients(model).values())
    cached = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY), cached)
    assert steered_positions(model) == 2 * 5
