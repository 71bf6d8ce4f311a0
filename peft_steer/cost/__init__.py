"""What a PEFT method costs on a model: bytes kept for backward, peak memory, and time of a step and of decoding."""

from .allocator import saved_bytes


__all__ = ["main", "saved_bytes"]


def main(argv: list[str]) -> int:
    """Runs `peft-steer cost`."""
    from ..cost import command

    return command.main(argv)
