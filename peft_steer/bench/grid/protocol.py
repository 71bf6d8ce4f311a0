"""The two waves of a comparison: a sweep whose choices are made on the validation split, then what is reported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_steer.utils.errors import UsageError

from .plan import Cell, Contender, Grid


Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """All cells of a comparison with their results, in the same order (the grid's: what is reported, then the sweep),
    and what is to be said about the choices."""

    cells: list[Cell]
    results: Results
    remarks: list[str]


def run_grid(grid: Grid, contenders: list[Contender], run: Callable[[list[Cell]], Results]) -> Outcome:
    """Runs the sweep, chooses, and runs the chosen cells with all seeds. `run` gives one result a cell, in order.

    The test split is evaluated once for each method and seed, and never looked at before.
    """
    groups = list(grid.groups(contenders))
    sweep = [cell for group in groups if _is_sweep(group) for cell in group]
    swept = dict(zip((cell.key for cell in sweep), run(sweep), strict=True))
    chosen, remarks = [], []
    for group in groups:
        best, remark = _choose(group, [swept[cell.key] for cell in group]) if _is_sweep(group) else (group[0], None)
        remarks += [remark] if remark else []
        chosen += grid.repeated(best) if best else []
    if grid.choose:
        said = {**grid.choose, **grid.choose.get("train", {})}
        remarks.append("Chosen with " + ", ".join(f"{key} {value}" for key, value in said.items() if key != "train"))
    final = [cell for cell in chosen if cell.key not in swept]  # looking at the sweep alone, they are the same
    return Outcome(final + sweep, [*run(final), *swept.values()], remarks)


def planned(grid: Grid, contenders: list[Contender]) -> tuple[list[Cell], list[Cell]]:
    """The sweep's cells, and the ones after it, as if the first of each group were chosen.

    Raises:
        UsageError: If two methods define the same cell.
    """
    groups = list(grid.groups(contenders))
    names: dict[str, str] = {}
    for cell in (cell for group in groups for cell in group):
        if cell.key in names:
            raise UsageError(f"methods {names[cell.key]!r} and {cell.name!r} define the same run; remove one")
        names[cell.key] = cell.name
    sweep = [cell for group in groups if _is_sweep(group) for cell in group]
    keys = {cell.key for cell in sweep}
    return sweep, [cell for group in groups for cell in grid.repeated(group[0]) if cell.key not in keys]


def _is_sweep(group: list[Cell]) -> bool:
    return len(group) > 1


def _choose(group: list[Cell], results: Results) -> tuple[Cell | None, str | None]:
    """The cell with the best validation score; of equal ones the one with the smallest rate."""
    done = [(cell, r["score"]) for cell, r in zip(group, results, strict=True) if r["status"] == "done"]
    where = f"{group[0].model}, {group[0].task}, {group[0].name}"
    if not done:
        return None, f"{where}: all {len(group)} runs of its sweep failed, so nothing was chosen and nothing tested"
    best, _ = min(done, key=lambda pair: (-pair[1], pair[0].learning_rate))
    remarks = []
    if len(done) < len(group):
        remarks.append(f"{len(group) - len(done)} of the {len(group)} runs of its sweep failed")
    rates = sorted({cell.learning_rate for cell in group})
    if len(rates) > 1 and best.learning_rate in (rates[0], rates[-1]):
        end = "largest" if best.learning_rate == rates[-1] else "smallest"
        remarks.append(f"the chosen learning rate {best.learning_rate:g} is the {end} tried: widen the sweep")
    return best, f"{where}: {'; '.join(remarks)}" if remarks else None
