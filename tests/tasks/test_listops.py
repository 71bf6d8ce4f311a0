"""The generated ListOps tasks: right answers, disjoint splits, the same data every time."""

import re
import statistics

import pytest

from lm_eval_tasks.listops.generate import load
from peft_steer.evaluation.tasks import load_task


SHORT = {
    "max_depth": 2,
    "max_symbols": 12,
    "max_args": 5,
    "operators": ["max", "min", "med", "sm"],
    "n_train": 300,
    "n_validation": 100,
    "n_test": 100,
    "seed": 0,
}


def evaluate(expression: str) -> int:
    """An evaluator that shares nothing with the generator: innermost calls are replaced by their value, outwards."""
    rules = {
        "max": lambda v: sorted(v)[-1],
        "min": lambda v: sorted(v)[0],
        "med": lambda v: int(statistics.median(v)),
        "sm": lambda v: int(str(sum(v))[-1]),
    }
    while "(" in expression:
        expression = re.sub(
            r"(max|min|med|sm)\(([\d,]+)\)",
            lambda m: str(rules[m[1]]([int(digit) for digit in m[2].split(",")])),
            expression,
        )
    return int(expression)


def depth(expression: str) -> int:
    level = deepest = 0
    for character in expression:
        level += {"(": 1, ")": -1}.get(character, 0)
        deepest = max(deepest, level)
    return deepest


@pytest.mark.parametrize(("max_depth", "max_symbols"), [(1, 5), (2, 12), (4, 64)])
def test_values_and_limits(max_depth, max_symbols):
    data = load(**{**SHORT, "max_depth": max_depth, "max_symbols": max_symbols})
    documents = [doc for split in data.values() for doc in split]
    assert len(documents) == 500
    assert all(evaluate(doc["expression"]) == doc["value"] for doc in documents)
    assert max(depth(doc["expression"]) for doc in documents) == max_depth
    sizes = [len(re.findall(r"[a-z]+|\d", doc["expression"])) for doc in documents]
    assert min(sizes) >= 3
    assert max_symbols // 2 < max(sizes) <= max_symbols
    assert {doc["value"] for doc in documents} == set(range(10))
    assert {name for doc in documents for name in re.findall("[a-z]+", doc["expression"])} == set(SHORT["operators"])


def test_splits_are_disjoint_and_stay_so_when_one_grows():
    small, large = load(**SHORT), load(**{**SHORT, "n_train": 3000, "seed": 1})
    held_out = {
        text for data in (small, large) for split in ("validation", "test") for text in data[split]["expression"]
    }
    assert not held_out & {*small["train"]["expression"], *large["train"]["expression"]}
    assert not {*small["validation"]["expression"]} & {*small["test"]["expression"]}
    assert all(len(set(split["expression"])) == len(split) for split in small.values())


def test_same_parameters_same_data():
    first, second, other = load(**SHORT), load(**SHORT), load(**{**SHORT, "seed": 1})
    assert all(first[split].to_dict() == second[split].to_dict() for split in first)
    assert first["train"].to_dict() != other["train"].to_dict()
    assert first["train"][0] == {"expression": "min(8,8,1,6,0)", "value": 0}


def evaluate_brackets(expression: str) -> int:
    """`[MAX 3 4 [MIN 2 9 ] ]`, by the evaluator of the other spelling."""
    calls = re.sub(r"\[([A-Z]+) ", lambda m: f"{m[1].lower()}(", expression)
    return evaluate(calls.replace(" ]", ")").replace(" ", ","))


def test_the_original_spelling_and_lengths():
    sizes = {"n_train": 80, "n_validation": 10, "n_test": 10}
    deep = {"max_depth": 10, "max_args": 10, "min_symbols": 32, "max_symbols": 64, "brackets": True}
    data = load(**{**SHORT, **sizes, **deep})
    documents = [doc for split in data.values() for doc in split]
    assert all(evaluate_brackets(doc["expression"]) == doc["value"] for doc in documents)
    lengths = [len(doc["expression"].split()) for doc in documents]
    assert (min(lengths), max(lengths)) == (32, 64)
    assert max(depth(doc["expression"].replace("[", "(").replace("]", ")")) for doc in documents) > 4


def test_long_range_lists_are_a_parameter_of_the_task():
    sizes = {"n_train": 8, "n_validation": 1, "n_test": 1}
    task, _ = load_task("steer_listops", metadata={"min_symbols": 500, "max_symbols": 2000, **sizes})
    assert all(500 <= len(text.split()) <= 2000 for text in task.training_docs()["expression"])


def test_the_data_of_version_1_stay_as_they_are():
    task, _ = load_task("listops", metadata={"n_train": 400, "n_validation": 50, "n_test": 50})
    assert task.training_docs()["expression"][-1] == "max(2,9,8,2,sm(sm(6,max(3,2),5),7,2,4,5))"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_symbols": 13}, "max_symbols >= 3 and >= min_symbols, got .*min_symbols=13, max_symbols=12"),
        ({"operators": ["max", "mean"]}, r"operators: \['mean'\] unknown"),
        ({"max_depth": 0}, "max_depth=0"),
        ({"max_args": 1}, "max_args=1"),
        ({"max_symbols": 3, "max_depth": 1, "n_train": 5000}, "Ask for fewer, or for longer ones"),
    ],
)
def test_impossible_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        load(**{**SHORT, **change})


def test_the_harness_scores_what_the_generator_says():
    task, _ = load_task("listops_short")
    doc = task.test_docs()[0]
    context = task.fewshot_context(doc, num_fewshot=0)
    requests = task.construct_requests(doc, context)
    assert context == f"{doc['expression']}="
    assert [request.arguments for request in requests] == [(context, str(digit)) for digit in range(10)]
    right = [(0.0 if digit == doc["value"] else -1.0, False) for digit in range(10)]
    assert task.process_results(doc, right) == {"acc": 1.0}
    assert task.process_results(doc, right[1:] + right[:1]) == {"acc": 0.0}
    assert [len(docs) for docs in (task.training_docs(), task.validation_docs(), task.test_docs())] == [
        4000,
        1000,
        1000,
    ]


@pytest.mark.parametrize(
    ("generated", "right"), [("{}", True), (" {},", True), ("={}!", True), ("{}0", False), ("0{}", False), ("", False)]
)
def test_lists_are_scored_by_the_first_number(generated, right):
    task, _ = load_task("list_max_min")
    doc = next(doc for doc in task.test_docs() if doc["value"] == 7)
    context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot)
    assert context == f"max(3,7)=7\nmin(5,2,8)=2\n{doc['expression']}="
    request = task.construct_requests(doc, context, metadata=("list_max_min", 0, 1))
    request.resps = [generated.format(7)]
    task._instances = [request]
    task.apply_filters()
    assert task.process_results(doc, [request.filtered_resps["first-number"]]) == {"exact_match": float(right)}


def test_lists_are_flat_and_their_examples_are_not_held_out():
    task, _ = load_task("list_max_min")
    splits = {"train": task.training_docs(), "validation": task.validation_docs(), "test": task.test_docs()}
    assert {name: len(docs) for name, docs in splits.items()} == {"train": 4000, "validation": 500, "test": 500}
    assert all(
        re.fullmatch(r"(max|min)\(\d(,\d){1,3}\)", text) for docs in splits.values() for text in docs["expression"]
    )
    for example in task.fewshot_docs():
        assert evaluate(example["expression"]) == example["value"]
        assert example["expression"] not in {*splits["validation"]["expression"], *splits["test"]["expression"]}
