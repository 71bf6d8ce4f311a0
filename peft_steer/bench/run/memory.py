"""Peak memory of a stretch of code, on the accelerator if there is one, else of this process; and memory reserved
while training."""

import resource
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from peft_steer.utils.devices import counts_memory, default_device


def reset_peak() -> None:
    """Starts a new measurement. macOS cannot reset a process's peak: there it counts from the process's start."""
    if counts_memory(default_device()):
        torch.accelerator.empty_cache()  # of what ran before
        torch.accelerator.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # 5: set the high-water mark to the current resident size


def peak_bytes() -> int:
    """The peak since `reset_peak`: bytes allocated on the accelerator, or resident bytes of the process."""
    if counts_memory(default_device()):
        return torch.accelerator.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class ReservedMemory(TrainerCallback):
    """What torch's allocator holds on the accelerator after each step, as PEFT's method comparison reports it."""

    def __init__(self) -> None:
        self._bytes: list[int] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self._bytes.append(torch.accelerator.memory_reserved() if counts_memory(default_device()) else 0)

    def summary(self) -> dict[str, int]:
        """Bytes: `mean` and `p99` over the steps, and the `max` of all times. Zero without an accelerator."""
        top = torch.accelerator.max_memory_reserved() if counts_memory(default_device()) else 0
        return {"mean": int(np.mean(self._bytes)), "p99": int(np.percentile(self._bytes, 99)), "max": top}
