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
    options = list(grid.options(contenders))
    sweep = [cell for cells in options if _is_sweep(cells) for cell in cells]
    swept = dict(zip((cell.key for cell in sweep), run(sweep), strict=True))
    chosen, remarks = [], []
    for cells in options:
        best, remark = _choose(cells, [swept[cell.key] for cell in cells]) if _is_sweep(cells) else (cells[0], None)
        remarks += [remark] if remark else []
        chosen += grid.repeated(best) if best else []
    if grid.choose:
        said = {**grid.choose, **grid.choose.get("train", {})}
        remarks.append("Chosen with " + ", ".join(f"{key} {value}" for key, value in said.items() if key != "train"))
    final = [cell for cell in chosen if cell.key not in swept]  # looking at the sweep alone, they are the same
    return Outcome(final + sweep, [*run(final), *swept.values()], remarks)


def planned(grid: Grid, contenders: list[Contender]) -> tuple[list[Cell], list[Cell]]:
    """The sweep's cells, and the ones after it, as if the first candidate of each sweep were chosen.

    Raises:
        UsageError: If two methods define the same cell.
    """
    options = list(grid.options(contenders))
    names: dict[str, str] = {}
    for cell in (cell for cells in options for cell in cells):
        if cell.key in names:
            raise UsageError(f"methods {names[cell.key]!r} and {cell.name!r} define the same run; remove one")
        names[cell.key] = cell.name
    sweep = [cell for cells in options if _is_sweep(cells) for cell in cells]
    keys = {cell.key for cell in sweep}
    return sweep, [cell for cells in options for cell in grid.repeated(cells[0]) if cell.key not in keys]


def _is_sweep(cells: list[Cell]) -> bool:
    return len(cells) > 1


def _choose(cells: list[Cell], results: Results) -> tuple[Cell | None, str | None]:
    """The cell with the best validation score; of equal ones the one with the smallest rate."""
    done = [(cell, r["score"]) for cell, r in zip(cells, results, strict=True) if r["status"] == "done"]
    where = f"{cells[0].model}, {cells[0].task}, {cells[0].name}"
    if not done:
        return None, f"{where}: all {len(cells)} runs of its sweep failed, so nothing was chosen and nothing tested"
    best, _ = min(done, key=lambda pair: (-pair[1], pair[0].learning_rate))
    remarks = []
    if len(done) < len(cells):
        remarks.append(f"{len(cells) - len(done)} of the {len(cells)} runs of its sweep failed")
    rates = sorted({cell.learning_rate for cell in cells})
    if len(rates) > 1 and best.learning_rate in (rates[0], rates[-1]):
        end = "largest" if best.learning_rate == rates[-1] else "smallest"
        remarks.append(f"the chosen learning rate {best.learning_rate:g} is the {end} tried: widen the sweep")
    return best, f"{where}: {'; '.join(remarks)}" if remarks else None
