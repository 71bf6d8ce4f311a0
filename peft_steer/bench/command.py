"""`peft-steer bench`: from a grid file to trained adapters and a report."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from peft_steer.evaluation.splits import complete_splits
from peft_steer.evaluation.tasks import evaluate_on, load_task
from peft_steer.utils.errors import UsageError
from peft_steer.utils.hub import find_model
from peft_steer.utils.recipes import find_recipe

from .engines import make_engine
from .engines.base import EngineError
from .grid.candidates import contenders
from .grid.estimate import Estimator
from .grid.parse import load_grid
from .grid.peft_schema import export_peft
from .grid.plan import Contender, Grid
from .grid.protocol import planned, run_grid
from .grid.task_checks import check_tasks
from .report import write_report
from .scheduler import run_cells
from .store import Store


def run(args: argparse.Namespace) -> int:
    """Runs a grid. Returns 0, or 1 if a cell failed, or 130 after Ctrl-C.

    Raises:
        UsageError: If the grid cannot be run as written.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    args.grid = find_recipe(str(args.grid))
    directory = args.output or Path("results") / args.grid.stem
    grid = _with_sources(load_grid(args.grid, model=args.model))
    tasks = _tasks(grid)
    entrants, remarks = contenders(grid)
    sweep, final = planned(grid, entrants)
    engine = make_engine(args.engine, args.jobs, args.address)
    if not args.dry_run:
        engine.check([*sweep, *final])
        store = Store(directory)
    for line in remarks:
        print(line)
    print(f"{len(sweep) + len(final)} runs: {len(sweep)} to choose on validation, {len(final)} after it.", flush=True)
    if args.dry_run:
        print(_preview([*sweep, *final], entrants, tasks))
        return 0
    try:
        with engine:
            outcome = run_grid(grid, entrants, lambda cells: run_cells(cells, store, engine))
    except EngineError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where this run stopped.", file=sys.stderr)
        return 130
    print(f"\n{write_report(grid, outcome.cells, outcome.results, directory, outcome.remarks)}")
    print(f"Tables, figures and adapters: {directory}. The page to look at: {directory / 'report.html'}")
    if args.export_peft:
        for line in export_peft(outcome.cells, outcome.results, args.export_peft):
            print(line)
    failed = sum(result["status"] == "failed" for result in outcome.results)
    if failed:
        print(f"{failed} of {len(outcome.cells)} runs failed; the same command tries them again.", file=sys.stderr)
    return 1 if failed else 0


def _with_sources(grid: Grid) -> Grid:
    """The grid with each model's weights located."""
    models = []
    for model in grid.models:
        source = find_model(model.name)
        print(f"Model: {source.label}\n       loaded from {source.path}", flush=True)
        models.append(replace(model, name=source.label, source=source.path))
    return replace(grid, models=tuple(models))


def _tasks(grid: Grid) -> dict[str, Any]:
    """The grid's tasks, by name, with all splits."""
    loaded = {}
    for entry in grid.tasks:
        loaded[entry.name], _ = load_task(
            entry.name, num_fewshot=entry.prompt.get("num_fewshot"), metadata=entry.metadata
        )
        if remark := complete_splits(loaded[entry.name]):
            print(remark)
        evaluate_on(loaded[entry.name], grid.split)
    check_tasks(grid, loaded)
    return loaded


def _preview(cells: list[Any], entrants: list[Contender], tasks: dict[str, Any]) -> str:
    sizes = {
        (entrant.model.name, entrant.method.name, repr(config)): size
        for entrant in entrants
        for config, size in zip(entrant.configs, entrant.trainable, strict=True)
    }
    estimator, rows = Estimator(), []
    for cell in cells:
        trainable = sizes[cell.model, cell.name, repr(cell.config)]
        estimate = estimator(cell, tasks[cell.task], trainable)
        rows.append(
            {
                "model": cell.model,
                "task": cell.task,
                "method": cell.name,
                "learning rate": f"{cell.learning_rate:g}" if cell.config else "–",
                "seed": cell.seed,
                "split": cell.split,
                "trainable": "?" if trainable is None else f"{trainable:,}",
                "minutes": estimate.seconds / 60,
                "GB": estimate.bytes / 1e9,
                "key": cell.key,
            }
        )
    frame = pd.DataFrame(rows)
    total = frame["minutes"].sum()
    frame = frame.drop(columns=[name for name in ("model", "task") if frame[name].nunique() == 1])
    formats = [{"minutes": ".1f", "GB": ".2f"}.get(name, "") for name in frame.columns]
    return (
        f"{frame.to_markdown(index=False, floatfmt=formats)}\n\n"
        f"About {total:.0f} minutes on this machine, if its processors are free (half or twice as much is as likely), "
        f"and {frame['GB'].max():.2f} GB at a time for weights, gradients and optimizer; what is kept for backward "
        "comes on top. What runs after the sweep stands for the choices, which are not known yet."
    )
