"""Compares PEFT methods as a grid file says: trains and evaluates each, then writes the tables."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_steer.utils.recipes import find_recipe


if TYPE_CHECKING:
    from .grid.plan import Contender, Grid


def main(argv: list[str]) -> int:
    """Runs `peft-steer bench`. Returns 0, or 1 if a cell failed, or 2 if the grid cannot be run as written."""
    parser = argparse.ArgumentParser(prog="peft-steer bench", description=__doc__)
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="what to compare")
    parser.add_argument("--model", help="directory or hub id, instead of the grid's")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results (default: results/<name of the grid>)")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and what they will take, and stop")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: 1; with Ray, all that fit)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine or a Ray cluster")
    parser.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS, else a new one on this machine)")
    parser.add_argument(
        "--export-peft",
        type=Path,
        metavar="DIR",
        help="also write what PEFT's method comparison reads: results, experiments",
    )
    args = parser.parse_args(argv)
    args.grid = find_recipe(str(args.grid))

    from .engines import make_engine
    from .engines.base import EngineError
    from .grid.candidates import contenders
    from .grid.parse import load_grid
    from .grid.peft_schema import export_peft
    from .grid.protocol import planned, run_grid
    from .report import write_report
    from .scheduler import run_cells
    from .store import Store

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    directory = args.output or Path("results") / args.grid.stem
    try:
        grid = _found(load_grid(args.grid, model=args.model))
        tasks = _tasks(grid)
        entrants, remarks = contenders(grid)
        sweep, final = planned(grid, entrants)
        engine = make_engine(args.engine, args.jobs, args.address)
        if not args.dry_run:
            engine.check([*sweep, *final])
            store = Store(directory)
    except (ValueError, OSError, ImportError) as error:
        print(f"peft-steer bench: {error}", file=sys.stderr)
        return 2
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
        print(f"peft-steer bench: {error}", file=sys.stderr)
        return 2
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


def _found(grid: "Grid") -> "Grid":
    """The grid with its models' weights found."""
    from peft_steer.utils.hub import find_model

    models = []
    for model in grid.models:
        source = find_model(model.name)
        print(f"Model: {source.label}\n       loaded from {source.path}", flush=True)
        models.append(replace(model, name=source.label, source=source.path))
    return replace(grid, models=tuple(models))


def _tasks(grid: "Grid") -> dict[str, Any]:
    """The grid's tasks, by name, with all splits."""
    from peft_steer.evaluation.splits import complete_splits
    from peft_steer.evaluation.tasks import evaluate_on, load_task

    from .grid.task_checks import check_tasks

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


def _preview(cells: list[Any], entrants: list["Contender"], tasks: dict[str, Any]) -> str:
    import pandas as pd

    from .grid.estimate import Estimator

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
