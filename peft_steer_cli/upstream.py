"""Warnings of other libraries about their own code, of which a user of our commands can mend nothing."""

import logging
import warnings


def hush() -> None:
    """Keeps them from being printed by this process. Warnings about what the user gave are untouched."""
    # TRL and PEFT use names that transformers has renamed.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
    # bitsandbytes, when it is imported: of a kernel for CPUs that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()
