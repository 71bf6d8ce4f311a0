"""What a reviewer asks of a comparison: standard errors, intervals, paired tests, a correction for their number, ties.

Scores come as a matrix of trainings (seeds) by test items. Both are samples: other seeds and other items would have
given another mean. The variance of a mean therefore has an item part and a seed part (Cameron, Gelbach and Miller
2011, two-way clustering; Miller 2024, arXiv 2411.00640, for paired items of language model evaluations). With one
training the seed part is unknown, and what is said holds for that trained model alone.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_letters
from typing import Any

import networkx
import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


ALPHA = 0.05
_POWER = 0.8


@dataclass(frozen=True)
class Scores:
    """What one contender scored.

    Attributes:
        name: The contender's.
        ids: Names of the items, with the number of their occurrence: identical documents have identical hashes.
        values: Float64 `[n_seeds, n_items]`.
    """

    name: str
    ids: tuple[tuple[str, int], ...]
    values: np.ndarray

    @classmethod
    def gather(cls, name: str, trainings: Sequence[dict[str, Any]]) -> "Scores":
        """Joins the `items` of the results of several trainings, `{"ids": [...], "scores": [...]}` each, by their ids.

        Raises:
            ValueError: If the trainings were evaluated on different items, or an item has no finite score.
        """
        columns = [_by_id(name, items) for items in trainings]
        ids = tuple(columns[0])
        for column in columns[1:]:
            _check_same_items(name, ids, name, column)
        return cls(name, ids, np.array([[column[item] for item in ids] for column in columns]))

    @property
    def binary(self) -> bool:
        """Whether every item is right or wrong."""
        return bool(np.isin(self.values, (0, 1)).all())


@dataclass(frozen=True)
class Summary:
    """A mean over seeds and items, its standard error, and the 95 % confidence interval [low, high]."""

    mean: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two contenders on the same items.

    Attributes:
        first, second: Their names.
        difference: Mean of the first less mean of the second; NaN if they cannot be compared.
        low, high: 95 % confidence interval of the difference, not corrected for the number of comparisons.
        p: Of the null hypothesis that the means are equal.
        p_holm: `p` corrected for all comparisons of the family (Holm 1979).
        test: Which one, or why there is none.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    test: str
    p_holm: float = math.nan

    @property
    def detectable(self) -> float:
        """The true difference that such a comparison, uncorrected, finds with a probability of 80 %: about 2.8
        standard errors where the degrees of freedom are many."""
        half = (self.high - self.low) / 2
        return half * (1 + stats.norm.ppf(_POWER) / stats.norm.ppf(1 - ALPHA / 2))

    @property
    def tie(self) -> bool:
        """Whether the gap is inside the noise. What could not be compared is not known to differ."""
        return not self.p_holm < ALPHA


def summarize(scores: Scores) -> Summary:
    """The mean with its standard error and interval.

    The interval is Wilson's for one training with right and wrong answers, and Student's t otherwise, over seeds and
    items, with Satterthwaite's degrees of freedom.
    """
    mean = float(scores.values.mean())
    variance, df = _variance(scores.values)
    stderr = math.sqrt(variance)
    n_seeds, n_items = scores.values.shape
    if n_seeds == 1 and scores.binary:
        low, high = proportion_confint(round(mean * n_items), n_items, alpha=ALPHA, method="wilson")
    else:
        low, high = _interval(mean, stderr, df)
        if scores.binary:
            low, high = max(low, 0.0), min(high, 1.0)
    return Summary(mean, stderr, float(low), float(high))


def compare(first: Scores, second: Scores) -> Comparison:
    """Tests whether two contenders differ, paired by item.

    One training each, with right and wrong answers: the exact McNemar test. Otherwise a t-test of the differences
    between items whose variance has a part for every contender with several seeds; without these parts it is
    `scipy.stats.ttest_rel`.

    Raises:
        ValueError: If they were evaluated on different items.
    """
    _check_same_items(first.name, first.ids, second.name, second.ids)
    place = {item: column for column, item in enumerate(second.ids)}
    other = second.values[:, [place[item] for item in first.ids]]
    difference = float(first.values.mean() - other.mean())
    variance, df = _variance(first.values, other)
    low, high = _interval(difference, math.sqrt(variance), df)
    if len(first.values) == len(other) == 1 and first.binary and second.binary:
        right, wrong = first.values[0] == 1, other[0] == 1
        table = [[np.sum(right & wrong), np.sum(right & ~wrong)], [np.sum(~right & wrong), np.sum(~right & ~wrong)]]
        p, test = mcnemar(table, exact=True).pvalue, "exact McNemar"
    elif difference == 0:
        p, test = 1.0, "paired t"
    else:
        p = 2 * stats.t.sf(abs(difference) / math.sqrt(variance), df) if variance > 0 else 0.0
        test = "paired t"
    return Comparison(first.name, second.name, difference, low, high, float(p), test)


def compare_all(contenders: Sequence[Scores]) -> list[Comparison]:
    """Every pair, corrected as one family by Holm's method. A pair with different items is not compared: see its
    `test`."""
    made = []
    for first, second in combinations(contenders, 2):
        try:
            made.append(compare(first, second))
        except ValueError as error:
            nan = math.nan
            made.append(Comparison(first.name, second.name, nan, nan, nan, nan, f"not compared: {error}"))
    tested = [comparison for comparison in made if not math.isnan(comparison.p)]
    corrected = iter(multipletests([c.p for c in tested], alpha=ALPHA, method="holm")[1] if tested else ())
    return [c if math.isnan(c.p) else Comparison(**{**vars(c), "p_holm": float(next(corrected))}) for c in made]


def tie_letters(ranked: Sequence[str], comparisons: Iterable[Comparison]) -> dict[str, str]:
    """A compact letter display: contenders that share a letter are a tie, those that share none differ.

    Args:
        ranked: All names, the best first: its letters come first.
        comparisons: Every pair of them.
    """
    ties = networkx.Graph()
    ties.add_nodes_from(ranked)
    ties.add_edges_from((c.first, c.second) for c in comparisons if c.tie)
    rank = {name: number for number, name in enumerate(ranked)}
    groups = sorted(sorted(rank[name] for name in group) for group in networkx.find_cliques(ties))
    return {name: "".join(_letter(i) for i, group in enumerate(groups) if rank[name] in group) for name in ranked}


def _letter(number: int) -> str:
    return ascii_letters[number] if number < len(ascii_letters) else chr(0x100 + number)


def _by_id(name: str, items: dict[str, Any]) -> dict[tuple[str, int], float]:
    ids, scores = items["ids"], items["scores"]
    if len(ids) != len(scores) or not ids or not np.isfinite(np.asarray(scores, dtype=float)).all():
        raise ValueError(f"{name}: items: {len(ids)} ids and {len(scores)} scores, which must be finite numbers")
    seen: Counter[str] = Counter()
    column = {}
    for item, score in zip(ids, scores, strict=True):
        column[item, seen[item]] = float(score)
        seen[item] += 1
    return column


def _check_same_items(
    first: str, ids: Iterable[tuple[str, int]], second: str, others: Iterable[tuple[str, int]]
) -> None:
    here, there = set(ids), set(others)
    if here != there:
        raise ValueError(
            f"{first} and {second} were evaluated on different items: {len(here & there)} in both, "
            f"{len(here - there)} and {len(there - here)} in one alone"
        )


def _variance(*matrices: np.ndarray) -> tuple[float, float]:
    """Variance of the first matrix's mean, or of its difference from the second's, and its degrees of freedom.

    The item part is that of the items' means (or differences) over seeds; the seed part is that of the seeds' means.
    What a seed does to single items is in both, and is subtracted once: the residual of the two-way layout.
    """
    means = [matrix.mean(axis=0) for matrix in matrices]
    items = means[0] - means[1] if len(means) == 2 else means[0]
    n_items = len(items)
    if n_items < 2:
        return math.nan, math.nan
    total = items.var(ddof=1) / n_items
    spread = total**2 / (n_items - 1)
    for matrix in matrices:
        n_seeds = len(matrix)
        if n_seeds > 1:
            seed_means = matrix.mean(axis=1)
            residual = matrix - seed_means[:, None] - matrix.mean(axis=0) + matrix.mean()
            shared = (residual**2).sum() / ((n_seeds - 1) * (n_items - 1)) / (n_seeds * n_items)
            seeds = seed_means.var(ddof=1) / n_seeds
            total += max(0.0, seeds - shared)
            spread += seeds**2 / (n_seeds - 1)
    return float(total), float(total**2 / spread) if spread > 0 else math.inf


def _interval(centre: float, stderr: float, df: float) -> tuple[float, float]:
    half = float(stats.t.ppf(1 - ALPHA / 2, df)) * stderr
    return centre - half, centre + half
