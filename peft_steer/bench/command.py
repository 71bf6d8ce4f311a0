"""Compares PEFT methods on one task, as a grid file says: trains and evaluates each, then writes the table."""

import argparse
import logging
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Runs `peft-steer bench`. Returns 0, or 1 if a cell failed, or 2 if the grid cannot be run as written."""
    parser = argparse.ArgumentParser(prog="peft-steer bench", description=__doc__)
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="what to compare")
    parser.add_argument("--model", help="directory or hub id, instead of the grid's")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results (default: results/<name of the grid>)")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: 1; with Ray, all that fit)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine or a Ray cluster")
    parser.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS, else a new one on this machine)")
    args = parser.parse_args(argv)

    from peft_steer.bench.engine import make_engine, run_cells
    from peft_steer.bench.plan import load_grid
    from peft_steer.bench.report import write_report
    from peft_steer.bench.store import Store
    from peft_steer.models import find_model
    from peft_steer.tasks import evaluate_on, load_task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are for people who write tasks
    directory = args.output or Path("results") / args.grid.stem
    try:
        grid = load_grid(args.grid, model=args.model)
        evaluate_on(load_task(grid.task)[0], grid.split)
        source = find_model(grid.model)
        cells = grid.cells(source.label, source.path)
        engine = make_engine(args.engine, args.jobs, args.address)
        engine.check(cells)
        store = Store(directory)
    except (ValueError, OSError, ImportError) as error:
        print(f"peft-steer bench: {error}", file=sys.stderr)
        return 2
    print(f"Model: {source.label}\n       loaded from {source.path}", flush=True)
    try:
        with engine:
            results = run_cells(cells, store, engine)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where this run stopped.", file=sys.stderr)
        return 130
    print(f"\n{write_report(grid, cells, results, directory)}")
    print(f"Table, CSV and figure: {directory}. Adapters: {directory / 'adapters'}")
    failed = sum(result["status"] == "failed" for result in results)
    if failed:
        print(f"{failed} of {len(cells)} runs failed; the same command tries them again.", file=sys.stderr)
    return 1 if failed else 0
