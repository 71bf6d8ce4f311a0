"""The statistics of a comparison: against plainly written formulas, published examples, and data without a
difference."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from peft_steer.bench.statistics import Comparison, Scores, compare, compare_all, summarize, tie_letters


def scores(name: str, values, ids=None) -> Scores:
    """Rows are seeds."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    ids = [str(i) for i in range(values.shape[1])] if ids is None else ids
    return Scores.gather(name, [{"ids": ids, "scores": row.tolist()} for row in values])


def answers(rng: np.random.Generator, difficulty: np.ndarray, n_seeds: int, seed_sd: float) -> np.ndarray:
    """Right and wrong answers `[n_seeds, n_items]`: some items are harder, some seeds are better, the rest is luck."""
    ability = difficulty + seed_sd * rng.standard_normal((n_seeds, 1))
    return (ability + 0.5 * rng.standard_normal((n_seeds, len(difficulty))) > 0).astype(float)


def test_one_training_has_the_harness_standard_error_and_wilsons_interval():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), interval in published.items():
        found = summarize(scores("a", [1] * right + [0] * (n - right)))
        assert found.mean == pytest.approx(right / n)
        assert found.stderr == pytest.approx((found.mean * (1 - found.mean) / (n - 1)) ** 0.5)
        assert (found.low, found.high) == pytest.approx(interval, abs=5e-5)


def test_several_seeds_against_the_formula():
    values = answers(np.random.default_rng(0), np.random.default_rng(1).standard_normal(40), 3, 0.8)
    n_seeds, n_items = values.shape
    grand = values.mean()
    by_item = [values[:, i].mean() for i in range(n_items)]
    by_seed = [values[s].mean() for s in range(n_seeds)]
    items = sum((x - grand) ** 2 for x in by_item) / (n_items - 1) / n_items
    seeds = sum((x - grand) ** 2 for x in by_seed) / (n_seeds - 1) / n_seeds
    both = 0.0
    for s in range(n_seeds):
        for i in range(n_items):
            both += (values[s, i] - by_seed[s] - by_item[i] + grand) ** 2
    both /= (n_seeds - 1) * (n_items - 1) * n_seeds * n_items
    assert seeds > both  # else the seeds' part would be cut at zero, and not be seen here
    found = summarize(scores("a", values))
    assert found.stderr == pytest.approx((items + seeds - both) ** 0.5)
    df = (items + seeds - both) ** 2 / (items**2 / (n_items - 1) + seeds**2 / (n_seeds - 1))
    half = stats.t.ppf(0.975, df) * found.stderr
    assert (found.low, found.high) == pytest.approx((grand - half, grand + half))


def test_seeds_that_agree_add_nothing_and_seeds_that_differ_dominate():
    row = answers(np.random.default_rng(0), np.zeros(200), 1, 0.0)
    assert summarize(scores("a", np.repeat(row, 3, axis=0))).stderr == pytest.approx(
        summarize(scores("a", row)).stderr
    )
    # Every item scores the same: what varies are the seeds, and the interval is Student's over them.
    by_seed = np.array([0.3, 0.5, 0.4])
    found = summarize(scores("a", np.repeat(by_seed[:, None], 50, axis=1)))
    interval = stats.t.interval(0.95, 2, loc=0.4, scale=stats.sem(by_seed))
    assert (found.low, found.high) == pytest.approx(interval)


def test_mcnemar_published():
    # Agresti, Categorical Data Analysis, table 10.1: approval of the prime minister in two surveys of 1,600 people.
    first = [1] * 794 + [1] * 150 + [0] * 86 + [0] * 570
    second = [1] * 794 + [0] * 150 + [1] * 86 + [0] * 570
    found = compare(scores("first", first), scores("second", second))
    assert found.test == "exact McNemar"
    assert found.p == pytest.approx(2 * sum(math.comb(236, k) for k in range(87)) / 2**236)
    assert found.difference == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((0.0213, 0.0587), abs=1e-4)  # 0.04 ± 1.96 x 0.0095, section 10.1


def test_paired_t_published():
    # Student 1908, the sleep data: t = -4.0621, 9 degrees of freedom, p = 0.002833, (-2.4598858, -0.7001142).
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = compare(scores("first", first), scores("second", second))
    assert found.test == "paired t"
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142))


def test_items_are_matched_by_id():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2, (2, 60))
    ids = [f"document {i // 2}" for i in range(60)]  # each document twice
    order = sorted(range(60), key=lambda i: -(i // 2))  # another order; the copies of a document keep theirs
    straight = compare(scores("a", first, ids), scores("b", second, ids))
    shuffled = compare(scores("a", first, ids), scores("b", second[order], [ids[i] for i in order]))
    assert vars(straight) == pytest.approx(vars(shuffled), nan_ok=True)
    assert straight.difference == pytest.approx(first.mean() - second.mean())
    assert straight.p != pytest.approx(compare(scores("a", first), scores("b", second[order])).p)


def test_different_items_are_not_compared():
    a, b, c = scores("a", [1, 0, 1, 1]), scores("b", [1, 1, 0], ["0", "1", "7"]), scores("c", [0, 0, 0, 0])
    message = "a and b were evaluated on different items: 2 in both, 2 and 1 in one alone"
    with pytest.raises(ValueError, match=message):
        compare(a, b)
    found = {(x.first, x.second): x for x in compare_all([a, b, c])}
    assert found["a", "b"].test == f"not compared: {message}"
    assert found["a", "b"].tie
    assert (
        found["a", "c"].p == found["a", "c"].p_holm == pytest.approx(0.25)
    )  # the only test, of three discordant items
    with pytest.raises(ValueError, match="a and a were evaluated on different items"):
        Scores.gather("a", [{"ids": ["0"], "scores": [1]}, {"ids": ["1"], "scores": [1]}])


@pytest.mark.parametrize("items", [{"ids": ["0", "1"], "scores": [1]}, {"ids": ["0"], "scores": [math.nan]}])
def test_items_without_scores_are_refused(items):
    with pytest.raises(ValueError, match=r"LoRA: items: . ids and 1 scores"):
        Scores.gather("LoRA", [items])


def test_holm_over_all_pairs():
    rng = np.random.default_rng(0)
    contenders = [
        scores(name, rng.random(80) < rate) for name, rate in zip("abcd", (0.2, 0.35, 0.42, 0.5), strict=True)
    ]
    found = compare_all(contenders)
    assert [(x.first, x.second) for x in found] == list(combinations("abcd", 2))
    running = 0.0
    for rank, comparison in enumerate(sorted(found, key=lambda x: x.p)):
        running = min(1.0, max(running, (6 - rank) * comparison.p))
        assert comparison.p_holm == pytest.approx(running)
        assert comparison.tie == (running >= 0.05)
    assert any(x.p < 0.05 <= x.p_holm for x in found)  # the correction decides here


def test_letters_say_what_the_tests_say():
    def pair(first: str, second: str, p: float) -> Comparison:
        return Comparison(first, second, 0.1, 0.0, 0.2, p, "", p_holm=p)

    differ = {("best", "base"), ("best", "worst"), ("good", "worst")}
    names = ["best", "good", "base", "worst"]
    found = [pair(x, y, 0.01 if (x, y) in differ else 0.5) for x, y in combinations(names, 2)]
    assert tie_letters(names, found) == {"best": "a", "good": "ab", "base": "bc", "worst": "c"}
    rng = np.random.default_rng(0)
    names = [f"method {i}" for i in range(20)]
    found = [pair(x, y, p) for (x, y), p in zip(combinations(names, 2), rng.random(190) ** 3, strict=True)]
    letters = tie_letters(names, found)
    for x in found:
        assert bool(set(letters[x.first]) & set(letters[x.second])) == x.tie


def test_no_difference_is_rarely_found():
    """Type-I error at a nominal 5 %, for methods that are equal except for the luck of their seeds."""
    rng = np.random.default_rng(0)
    n_items, repeats = 100, 400
    for n_seeds, seed_sd in ((1, 0.0), (3, 0.0), (3, 0.2), (2, 0.2)):
        found, over_items_alone, covered = 0, 0, 0
        for _ in range(repeats):
            difficulty = rng.standard_normal(n_items)
            first, second = (answers(rng, difficulty, n_seeds, seed_sd) for _ in range(2))
            comparison = compare(scores("a", first), scores("b", second))
            found += comparison.p < 0.05
            covered += comparison.low <= 0 <= comparison.high
            over_items_alone += stats.ttest_rel(first.mean(0), second.mean(0)).pvalue < 0.05
        assert found / repeats < 0.075, (n_seeds, seed_sd)
        assert covered / repeats > 0.925, (n_seeds, seed_sd)
        if seed_sd:  # what a test that takes the seeds for the whole truth would say
            assert found / repeats > 0.01
            assert over_items_alone / repeats > 0.25


def test_a_family_of_equal_methods_is_a_tie(monkeypatch):
    monkeypatch.setattr(
        "gc.collect", lambda: None
    )  # statsmodels calls it for every correction, which takes most of the time
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        difficulty = rng.standard_normal(100)
        family = [scores(str(i), answers(rng, difficulty, 3, 0.1)) for i in range(5)]
        wrong += not all(comparison.tie for comparison in compare_all(family))
    assert wrong / 100 < 0.1


def test_a_real_difference_is_found():
    rng = np.random.default_rng(0)
    difficulty = rng.standard_normal(400)
    better, base = answers(rng, difficulty + 0.4, 3, 0.05), answers(rng, difficulty, 1, 0.0)
    found = compare(scores("better", better), scores("base", base))
    assert found.test == "paired t"  # one of the two has several seeds
    assert found.p < 1e-3
    assert found.low > 0
