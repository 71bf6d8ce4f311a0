"""reasoning-gym's data sets as tasks, with their own verifiers."""

import json

import pytest
import reasoning_gym

from lm_eval_tasks.reasoning_gym.generate import load
from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import sft_dataset
from peft_steer.evaluation.rewards import reward_function


NAMES = ["gsm_symbolic", "chain_sum", "spell_backward", "letter_counting"]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_data_and_a_reward(name):
    task, _ = tasks.load_task(f"reasoning_gym_{name}")
    sft = sft_dataset(task)
    assert len(sft) == 2000
    assert sft[0]["prompt"].endswith("\nAnswer:")
    questions = [set(docs["question"]) for docs in (task.training_docs(), task.validation_docs(), task.test_docs())]
    assert [len(q) for q in questions] == [2000, 200, 200]
    assert len(set.union(*questions)) == 2400
    reward = reward_function(task)
    columns = {"split": ["train"] * 8, "doc_id": list(range(8))}
    assert reward(completions=[f"{text}\nmore" for text in sft["completion"][:8]], **columns) == [1.0] * 8
    assert reward(completions=["no idea"] * 8, **columns) == [0.0] * 8
    scores = reward_function(task, "score,none")(completions=["7"] * 8, **columns)
    entries = [json.loads(doc["entry"]) for doc in list(task.training_docs())[:8]]
    assert scores == [reasoning_gym.get_score_answer_fn(name)("7", entry) for entry in entries]


def test_parameters():
    sizes = {"n_train": 5, "n_validation": 2, "n_test": 2, "seed": 3}
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    data = load("chain_sum", **sizes, params=params, version=1.0)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 5, "validation": 2, "test": 2}
    assert data["train"][:] == load("chain_sum", **sizes, params=params)["train"][:]
    assert data["train"][:] != load("chain_sum", **{**sizes, "seed": 4}, params=params)["train"][:]
    with pytest.raises(ValueError, match=r"'chain_sum' does not take \{'terms': 2\}"):
        load("chain_sum", **sizes, params={"terms": 2})
    with pytest.raises(ValueError, match="found"):
        load("chain_sum", **{**sizes, "n_train": 300}, params=params)
    with pytest.raises(ValueError, match="chain_some"):
        load("chain_some", **sizes)
