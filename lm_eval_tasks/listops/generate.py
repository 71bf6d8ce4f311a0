"""ListOps expressions (Nangia & Bowman 2018), generated: the same parameters always give the same data."""

import hashlib
import random
from collections.abc import Iterator

import datasets


OPERATORS = {
    "max": max,
    "min": min,
    # The lower-rounded mean of the two middle values when their number is even, as in the original.
    "med": lambda values: (sorted(values)[(len(values) - 1) // 2] + sorted(values)[len(values) // 2]) // 2,
    "sm": lambda values: sum(values) % 10,
}
SPLITS = ("train", "validation", "test")
_PATIENCE = 20_000  # expressions in a row that are not new, before giving up


def load(
    max_depth: int,
    max_symbols: int,
    max_args: int,
    operators: list[str],
    n_train: int,
    n_validation: int,
    n_test: int,
    seed: int,
    **_: object,
) -> datasets.DatasetDict:
    """Builds the three splits. lm-eval passes the task's `metadata`, which `--metadata '{"max_depth": 3}'` overrides.

    An expression's own hash decides its split, so no expression is ever in two of them, whatever the sizes.

    Args:
        max_depth: Operators that may be nested in each other; 1 is a flat list.
        max_symbols: Operators and digits in an expression, at most.
        max_args: Arguments of an operator, at most; at least 2.
        operators: Some of `max`, `min`, `med`, `sm` (the sum modulo 10).
        n_train, n_validation, n_test: Expressions per split.
        seed: Of the generator.

    Returns:
        For each split the columns `expression` (such as `max(3,4,min(2,9))`) and `value` (0 to 9).

    Raises:
        ValueError: For a parameter out of range, or when so many different expressions were not found.
    """
    if unknown := set(operators) - set(OPERATORS):
        raise ValueError(f"operators: {sorted(unknown)} unknown, choose from {list(OPERATORS)}")
    if not operators or max_depth < 1 or max_args < 2 or max_symbols < 3:
        raise ValueError(
            "ListOps needs operators, max_depth >= 1, max_args >= 2 and max_symbols >= 3, "
            f"got {operators=}, {max_depth=}, {max_args=}, {max_symbols=}"
        )
    wanted = dict(zip(SPLITS, (n_train, n_validation, n_test), strict=True))
    found: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    expressions = _expressions(random.Random(seed), operators, max_depth, max_args, max_symbols)
    misses = 0
    while any(len(found[split]) < wanted[split] for split in SPLITS):
        expression, value = next(expressions)
        same_split = found[_split(expression)]
        if expression in same_split or len(same_split) == wanted[_split(expression)]:
            misses += 1
        else:
            same_split[expression] = value
            misses = 0
        if misses == _PATIENCE:
            counts = {split: len(found[split]) for split in SPLITS}
            raise ValueError(
                f"ListOps: wanted {wanted} different expressions, found {counts} with {operators=}, {max_depth=}, "
                f"{max_args=}, {max_symbols=}. Ask for fewer, or for longer ones."
            )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"expression": list(items), "value": list(items.values())})
            for split, items in found.items()
        }
    )


def _split(expression: str) -> str:
    bucket = hashlib.sha256(expression.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _expressions(
    rng: random.Random, operators: list[str], max_depth: int, max_args: int, max_symbols: int
) -> Iterator[tuple[str, int]]:
    while True:
        expression, value, symbols = _tree(rng, operators, max_depth, max_args)
        if symbols <= max_symbols:  # always so in the end: two arguments make three symbols
            yield expression, value


def _tree(rng: random.Random, operators: list[str], depth: int, max_args: int) -> tuple[str, int, int]:
    """One operator and its arguments, each of them an operator with the original's probability, 1/4."""
    name = rng.choice(operators)
    texts, values, symbols = [], [], 1
    for _ in range(rng.randint(2, max_args)):
        if depth > 1 and rng.random() < 0.25:
            text, value, size = _tree(rng, operators, depth - 1, max_args)
        else:
            value, size = rng.randrange(10), 1
            text = str(value)
        texts.append(text)
        values.append(value)
        symbols += size
    return f"{name}({','.join(texts)})", OPERATORS[name](values), symbols
