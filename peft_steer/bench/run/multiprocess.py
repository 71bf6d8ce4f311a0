"""A cell that several processes train together, one GPU each: they are started as `accelerate launch` starts them.

That is torch's elastic launcher on one node, called here directly because accelerate's command asks for MPI where
there are no GPUs. In the processes transformers' trainer finds the others through accelerate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..grid.plan import Cell
from .worker import Worker


def shared_batch(cell: Cell) -> dict[str, Any]:
    """The cell's `train` for each of its processes: an optimizer step sees the same rows as one process's does.

    Raises:
        ValueError: If the batch cannot be divided among the processes.
    """
    from trl import SFTConfig

    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    sizes = {name: cell.train.get(name, SFTConfig.__dataclass_fields__[name].default) for name in names}
    for name, size in sizes.items():
        if size % cell.processes == 0:
            return {**cell.train, name: size // cell.processes}
    raise ValueError(
        f"{cell.name}: processes: {cell.processes} cannot share batches of {sizes[names[0]]} x {sizes[names[1]]} rows "
        f"among them; make {names[0]} or {names[1]} a multiple of {cell.processes}"
    )


def launch(cell: Cell, adapter_dir: Path) -> dict[str, Any]:
    """Runs a cell in `cell.processes` new processes, which end when this one does.

    Returns:
        The result of the first of them, or of one that failed.
    """
    with tempfile.TemporaryDirectory(prefix="peft-steer-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={cell.processes}",
            "-m",
            "peft_steer.bench.run.multiprocess",
            folder,
            str(adapter_dir),
        ]
        (Path(folder) / "cell.json").write_text(json.dumps(asdict(cell)))
        # Nothing is ever written to its input: it closes when this process ends, even if it is killed.
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            process.wait()
        finally:
            process.stdin.close()
            process.wait()
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result-*.json"))]
    failed = [result for result in results if result["status"] == "failed"]
    if failed or process.returncode:
        error = f"its processes ended with exit code {process.returncode}, without a word"
        return failed[0] if failed else {"status": "failed", "error": error}
    return results[0]


def main(argv: list[str]) -> int:
    """What each of the processes does."""
    parser = argparse.ArgumentParser(prog="python -m peft_steer.bench.run.multiprocess", description=__doc__)
    parser.add_argument("folder", type=Path, help="has the cell; for the results")
    parser.add_argument("adapter_dir", type=Path)
    args = parser.parse_args(argv)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()

    import torch

    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    cell = Cell(**json.loads((args.folder / "cell.json").read_text()))
    # Only the first saves an adapter for keeps; all of them read one that is there.
    keeps = rank == 0 or args.adapter_dir.exists()
    torch.distributed.init_process_group()  # accelerate takes it as it is
    torch.distributed.barrier()  # before the first of them can have saved anything
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
    # Not by Python's own exit: torch 2.13's Gloo group, freed by it, now and then waits for ever for a thread of its
    # own that waits for the interpreter's lock.
    os._exit(status)
