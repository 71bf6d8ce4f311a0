"""Peak memory of a stretch of code: of the GPU if there is one, else of this process."""

import resource
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Starts a new measurement. macOS cannot reset a process's peak: there it counts from the process's start."""
    if torch.cuda.is_available():
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
