"""Peak memory of a stretch of code: of the GPU if there is one, else of this process. Memory reserved while
training."""

import resource
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback


def reset_peak() -> None:
    """Starts a new measurement. macOS cannot reset a process's peak: there it counts from the process's start."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of what ran before
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # 5: set the high-water mark to the current resident size


def peak_bytes() -> int:
    """The peak since `reset_peak`: bytes allocated on the GPU, or resident bytes of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class ReservedMemory(TrainerCallback):
    """The GPU memory that torch's allocator holds after each step, as PEFT's method comparison reports it."""

    def __init__(self) -> None:
        self._bytes: list[int] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self._bytes.append(torch.cuda.memory_reserved() if torch.cuda.is_available() else 0)

    def summary(self) -> dict[str, int]:
        """Bytes: `mean` and `p99` over the steps, and the `max` of all times. Zero without a GPU."""
        top = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return {"mean": int(np.mean(self._bytes)), "p99": int(np.percentile(self._bytes, 99)), "max": top}
