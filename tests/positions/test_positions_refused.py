"""Passes and ways to generate whose prompts cannot be known, and other things that positions refuse."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from positions_batch import batch, tokens_of_a_prompt
from positions_reference import GREEDY, steered
from tiny import inputs, make

from peft_steer import SteerConfig, steered_positions


@pytest.mark.parametrize("spec", ["", "first", "f0", "f7+f7", "l7+f7", "f7l7", "f-1", None, 7])
def test_unknown_positions(spec):
    with pytest.raises(ValueError, match="`positions="):
        SteerConfig(positions=spec)


UNKNOWN = "nothing tells where it ends"
REFUSED = {
    "no labels": ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, UNKNOWN),
    "labels from the first token": (batch(prompts=(0, 0)), "no sequence of this batch has a prompt"),
    "labels of two turns": (
        {**batch(), "labels": torch.tensor([[-100] * 3 + [5, 6, -100, -100, 7, 8]] * 2)},
        "more than once",
    ),
    "too few lengths": ({**inputs(), "prompt_lengths": [3]}, "another number of sequences"),
    "too long a prompt": ({**inputs(), "prompt_lengths": [3, 8]}, "longer than its sequence"),
    "a negative length": ({**inputs(), "prompt_lengths": [3, -1]}, "must not be negative"),
    "no integers": ({**inputs(), "prompt_lengths": [3.0, 2.0]}, "must have one integer"),
    "a mask of another shape": ({**inputs(), "completion_mask": torch.ones(2, 6)}, "do not show where prompts end"),
    "a four-dimensional mask": (
        {**inputs(), "attention_mask": torch.ones(2, 1, 7, 7), "prompt_lengths": [3, 3]},
        "two-dimensional",
    ),
    "a part of a sequence": (
        {**batch(), "position_ids": torch.arange(9)[None].expand(2, 9) + 3},
        "a part of a longer sequence",
    ),
    "boundaries without positions": (
        {**batch(), "attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 4, 9])},
        "needs the `position_ids` of packed sequences",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pass_whose_prompts_are_unknown(case):
    arguments, message = REFUSED[case]
    model = steered(positions="f2+l1")
    with pytest.raises(ValueError, match=message):
        model(**arguments)
    model(**batch())  # it recovers
    assert steered_positions(model) == 6


def test_a_part_of_the_model_alone():
    model = steered(positions="last")
    with pytest.raises(ValueError, match="a part of the model was called by itself"):
        model.get_base_model().model(**inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "two-dimensional"),
    ],
)
def test_ways_to_generate_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        steered(positions="last").generate(**{**tokens_of_a_prompt(), **GREEDY, **options})


def test_an_assistant_model():
    """Drafting for a steered model is fine, being steered while drafting is refused."""
    model, plain = steered(positions="f2+l1"), make()
    x = {name: value[1:] for name, value in tokens_of_a_prompt().items()}
    assert torch.equal(model.generate(**x, assistant_model=plain, **GREEDY), model.generate(**x, **GREEDY))
    with pytest.raises(ValueError, match="an assistant model continues sequences whose prompt it cannot know"):
        make().generate(**x, assistant_model=model.get_base_model(), **GREEDY)


@pytest.mark.parametrize(("spec", "stack"), [("last", "decoder"), ("completion", "encoder")])
def test_stacks_that_never_see_the_positions(spec, stack):
    with pytest.raises(ValueError, match=rf"has no token at '{stack}.block.0'.*target_modules="):
        steered("t5", positions=spec)


def test_no_adapter_to_count():
    with pytest.raises(ValueError, match="has no steering adapter"):
        steered_positions(get_peft_model(make(), LoraConfig(target_modules=["q_proj"])))
