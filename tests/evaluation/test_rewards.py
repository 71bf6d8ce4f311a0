"""A task's metric as a GRPO reward: what the harness would score for the same text."""

import datasets
import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_tasks import make_task

from peft_steer.evaluation.datasets import grpo_dataset
from peft_steer.evaluation.rewards import reward_function


def generative(**config):
    filters = [
        {
            "name": "strict",
            "filter": [{"function": "regex", "regex_pattern": r"#### (\w+)"}, {"function": "take_first"}],
        },
        {"name": "loose", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
    ]
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    defaults = {
        "output_type": "generate_until",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["\n", "Q:"]},
        "filter_list": filters,
        "metric_list": [metric],
    }
    return make_task(**{**defaults, **config})


GENERATIONS = ["#### two", "two", "so #### TWO", " #### two\nQ: more", "no Q: #### two", "", "#### four"]


class Says(LM):
    """A model that gives each document its generation, cut at the stop strings, as `HFLM` cuts."""

    def generate_until(self, requests, disable_tqdm=False):
        texts = list(GENERATIONS)
        for i, request in enumerate(requests):
            for stop in request.args[1]["until"]:
                texts[i] = texts[i].split(stop)[0]
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_the_reward_is_the_harness_score():
    rows = {"question": GENERATIONS, "text": ["two"] * len(GENERATIONS)}
    splits = {split: datasets.Dataset.from_dict(rows) for split in ("train", "test")}
    task = generative(custom_dataset=lambda **_: splits, validation_split=None)
    data = grpo_dataset(task)
    columns = {name: list(data[name]) for name in ("split", "doc_id")}
    harness = lm_eval.simple_evaluate(
        Says(), tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    for name, expected in (("strict", [1, 0, 1, 1, 0, 0, 0]), ("loose", [1, 1, 0, 1, 0, 0, 0])):
        samples = [sample for sample in harness["samples"]["made_up"] if sample["filter"] == name]
        scores = [sample["exact_match"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        reward = reward_function(task, f"exact_match,{name}")
        assert reward(completions=GENERATIONS, **columns) == scores == expected


def test_columns_of_the_data():
    data = grpo_dataset(generative(doc_to_target="It is #### {{text}}"), "validation")
    assert list(data["prompt"]) == ["Q: 1+1?\nA:", "Q: 2+2?\nA:"]
    assert list(data["solution"]) == ["two", "four"]
    assert list(grpo_dataset(generative())["solution"]) == [
        "two",
        "four",
    ]  # the filter does not match the target
    assert list(data["split"]) == ["validation"] * 2
    assert list(data["doc_id"]) == [0, 1]


def test_a_row_is_scored_against_its_own_document_and_chat_answers_by_their_text():
    reward = reward_function(generative())
    assert reward.__name__ == "exact_match,strict"
    assert reward(completions=["#### two", "#### two"], split=["train"] * 2, doc_id=[0, 1], prompts=[""] * 2) == [1, 0]
    answers = [[{"role": "assistant", "content": f"#### {word}"}] for word in ("four", "two")]
    assert reward(completions=answers, split=["validation"] * 2, doc_id=[1, 1]) == [1, 0]


@pytest.mark.parametrize(
    ("config", "metric", "message"),
    [
        ({"training_split": None}, None, "has no training split"),
        ({"training_split": "test"}, None, "the split that it is evaluated on"),
        ({"output_type": "multiple_choice", "doc_to_choice": "options"}, None, "only of 'generate_until'"),
        ({}, "exact_match,strikt", "did you mean 'exact_match,strict'"),
        ({}, "f1", "Known: exact_match,loose, exact_match,strict"),
        ({"process_results": lambda doc, results: {"both": (1, 2)}}, None, "not a number"),
        (
            {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": False}]},
            None,
            "less is better",
        ),
    ],
)
def test_what_is_no_reward(config, metric, message):
    with pytest.raises(ValueError, match=message):
        reward_function(generative(**config), metric)
