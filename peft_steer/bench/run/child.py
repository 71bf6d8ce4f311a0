"""One of the processes that train a cell together: `python -m peft_steer.bench.run.child FOLDER ADAPTER_DIR`."""

import argparse
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch

from peft_steer.utils.devices import has_accelerator

from ..grid.plan import Cell
from .multiprocess import shared_batch
from .worker import Worker


def main(argv: list[str]) -> int:
    """Runs this process's part of the cell. Returns 0, or 1 if the cell failed."""
    parser = argparse.ArgumentParser(prog="python -m peft_steer.bench.run.child", description=__doc__)
    parser.add_argument("folder", type=Path, help="has the cell; for the results")
    parser.add_argument("adapter_dir", type=Path)
    args = parser.parse_args(argv)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()
    rank = int(os.environ["RANK"])
    if has_accelerator():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    cell = Cell(**json.loads((args.folder / "cell.json").read_text()))
    # Only the first process keeps the adapter that it saves; all of them read one that exists.
    keeps = rank == 0 or args.adapter_dir.exists()
    torch.distributed.init_process_group()  # accelerate takes it as it is
    torch.distributed.barrier()  # before the first process can have saved anything
    adapter_dir = args.adapter_dir if keeps else args.folder / f"adapter-{rank}"
    result = Worker().run(replace(cell, processes=1, train=shared_batch(cell)), adapter_dir)
    (args.folder / f"result-{rank}.json").write_text(json.dumps(result))
    return 0 if result["status"] == "done" else 1


def _exit_at_end_of_input() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by Python's own exit: torch 2.13's Gloo group, freed by it, sometimes waits forever for a thread of its
    # own that waits for the interpreter's lock.
    os._exit(status)
