"""Where cells run: on this machine, or on a Ray cluster."""

from peft_steer.utils.errors import UsageError

from .base import Engine
from .local import LocalEngine


def make_engine(name: str = "local", jobs: int | None = None, address: str | None = None) -> Engine:
    """Makes the engine of `--engine`, `--jobs` and `--address`.

    Raises:
        UsageError: If the arguments do not fit each other, or if Ray is asked for and not installed.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least one cell must run at a time")
    if name == "ray":
        from .ray import RayEngine

        return RayEngine(address=address, jobs=jobs)
    if name != "local":
        raise UsageError(f"--engine {name}: must be 'local' or 'ray'")
    if address is not None:
        raise UsageError(f"--address {address}: only --engine ray has one")
    return LocalEngine(jobs=jobs or 1)
