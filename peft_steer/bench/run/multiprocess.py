"""A cell that several processes train together, one GPU each, started as `accelerate launch` starts them.

That is torch's elastic launcher on one node, called here directly because accelerate's command asks for MPI where
there are no GPUs. Each process runs `child.py`, where transformers' trainer finds the others through accelerate.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_steer.utils.errors import UsageError

from ..grid.plan import Cell


def shared_batch(cell: Cell) -> dict[str, Any]:
    """The cell's `train` for each of its processes: an optimizer step sees the same rows as one process's does.

    Raises:
        UsageError: If the batch cannot be divided among the processes.
    """
    from trl import SFTConfig

    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    sizes = {name: cell.train.get(name, SFTConfig.__dataclass_fields__[name].default) for name in names}
    for name, size in sizes.items():
        if size % cell.processes == 0:
            return {**cell.train, name: size // cell.processes}
    raise UsageError(
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
            "peft_steer.bench.run.child",
            folder,
            str(adapter_dir),
        ]
        (Path(folder) / "cell.json").write_text(json.dumps(asdict(cell)))
        # Nothing is ever written to its input: it closes when this process ends, even if it is killed.
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            process.wait()
        finally:
            process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
            process.wait()
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result-*.json"))]
    failed = [result for result in results if result["status"] == "failed"]
    if failed or process.returncode:
        error = f"its processes died with exit code {process.returncode}"
        return failed[0] if failed else {"status": "failed", "error": error}
    return results[0]
