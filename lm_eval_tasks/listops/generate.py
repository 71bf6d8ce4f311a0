"""ListOps expressions (Nangia & Bowman 2018), generated: the same parameters always give the same data."""

import hashlib
import math
import random
from collections.abc import Callable, Iterator

import datasets


OPERATORS: dict[str, Callable[[list[int]], int]] = {
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
    min_symbols: int = 3,
    brackets: bool = False,
    **_: object,
) -> datasets.DatasetDict:
    """Builds the three splits. lm-eval passes the task's `metadata`, which `--metadata '{"max_depth": 3}'` overrides.

    An expression's own hash decides its split, so no expression is in two of them, for any sizes.

    Args:
        max_depth: Operators that may be nested in each other; 1 is a flat list.
        max_symbols: Operators and digits in an expression, at most.
        max_args: Arguments of an operator, at most; at least 2.
        operators: Some of `max`, `min`, `med`, `sm` (the sum modulo 10).
        n_train, n_validation, n_test: Expressions per split.
        seed: Of the generator.
        min_symbols: Operators and digits in an expression, at least.
        brackets: Whether to write `[MAX 3 4 [MIN 2 9 ] ]`, as the original does. The closing brackets are symbols too,
            as in the lengths of the Long Range Arena.

    Returns:
        For each split the columns `expression` (such as `max(3,4,min(2,9))`) and `value` (0 to 9).

    Raises:
        ValueError: For a parameter out of range, or if there are too few different expressions.
    """
    if unknown := set(operators) - set(OPERATORS):
        raise ValueError(f"operators: {sorted(unknown)} unknown, choose from {list(OPERATORS)}")
    shortest = 4 if brackets else 3
    if not operators or max_depth < 1 or max_args < 2 or max_symbols < max(shortest, min_symbols):
        raise ValueError(
            f"ListOps needs operators, max_depth >= 1, max_args >= 2 and max_symbols >= {shortest} and "
            f">= min_symbols, got {operators=}, {max_depth=}, {max_args=}, {min_symbols=}, {max_symbols=}"
        )
    wanted = dict(zip(SPLITS, (n_train, n_validation, n_test), strict=True))
    drawn: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    expressions = _expressions(random.Random(seed), operators, max_depth, max_args, min_symbols, max_symbols, brackets)
    misses = 0
    while any(len(drawn[split]) < wanted[split] for split in SPLITS):
        expression, value = next(expressions)
        same_split = drawn[_split(expression)]
        if expression in same_split or len(same_split) == wanted[_split(expression)]:
            misses += 1
        else:
            same_split[expression] = value
            misses = 0
        if misses == _PATIENCE:
            counts = {split: len(drawn[split]) for split in SPLITS}
            raise ValueError(
                f"ListOps: wanted {wanted} different expressions, found {counts} with {operators=}, {max_depth=}, "
                f"{max_args=}, {min_symbols=}, {max_symbols=}. Ask for fewer, or for longer ones."
            )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"expression": list(items), "value": list(items.values())})
            for split, items in drawn.items()
        }
    )


def _split(expression: str) -> str:
    bucket = hashlib.sha256(expression.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _expressions(
    rng: random.Random,
    operators: list[str],
    max_depth: int,
    max_args: int,
    min_symbols: int,
    max_symbols: int,
    brackets: bool,
) -> Iterator[tuple[str, int]]:
    # Deep trees with many arguments grow to any size, so one that is too long is left unfinished. Not so without
    # brackets: the data of version 1.0 were drawn from complete ones.
    limit = max_symbols if brackets else math.inf
    while True:
        try:
            expression, value, symbols = _tree(rng, operators, max_depth, max_args, brackets, limit)
        except _TooLongError:
            continue
        if min_symbols <= symbols <= max_symbols:  # always so in the end
            yield expression, value


class _TooLongError(Exception):
    pass


def _tree(
    rng: random.Random, operators: list[str], depth: int, max_args: int, brackets: bool, limit: float
) -> tuple[str, int, int]:
    """One operator and its arguments, each of them an operator with the original's probability, 1/4."""
    name = rng.choice(operators)
    texts, values, symbols = [], [], 2 if brackets else 1
    for _ in range(rng.randint(2, max_args)):
        if depth > 1 and rng.random() < 0.25:
            text, value, size = _tree(rng, operators, depth - 1, max_args, brackets, limit)
        else:
            value, size = rng.randrange(10), 1
            text = str(value)
        texts.append(text)
        values.append(value)
        symbols += size
        if symbols > limit:
            raise _TooLongError
    text = f"[{name.upper()} {' '.join(texts)} ]" if brackets else f"{name}({','.join(texts)})"
    return text, OPERATORS[name](values), symbols
