"""The arguments of `peft-steer bench`."""

import argparse
from pathlib import Path

from .arguments import at_least


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-steer bench",
        description="Compares PEFT methods as a grid file says: trains and evaluates each, then writes the tables.",
        epilog="Exits with 0, with 1 if a run failed, with 2 if the grid cannot be run as written.",
    )
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID.yaml", help="what to compare")
    add("--model", help="directory or hub id, instead of the grid's")
    add("--output", type=Path, metavar="DIR", help="results (default: results/<name of the grid>)")
    add("--dry-run", "--dry_run", action="store_true", help="print the runs and what they will take, and stop")
    add("--jobs", type=at_least(1), metavar="N", help="runs at a time (default: 1; with Ray, all that fit)")
    add("--engine", choices=("local", "ray"), default="local", help="this machine or a Ray cluster")
    add("--address", help="of the Ray cluster (default: RAY_ADDRESS, else a new one on this machine)")
    add(
        "--export-peft",
        "--export_peft",
        type=Path,
        metavar="DIR",
        help="also write the files that PEFT's method comparison reads",
    )
    return parser
