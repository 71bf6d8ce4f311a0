"""What a PEFT method costs on a model: bytes kept for backward, peak memory, and time of a step and of decoding."""

from .allocator import saved_bytes


__all__ = ["saved_bytes"]
