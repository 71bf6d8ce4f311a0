"""Where cells run: on this machine, or on a Ray cluster."""

from typing import Any


def make_engine(name: str = "local", jobs: int | None = None, address: str | None = None) -> Any:
    """Makes the engine of `--engine`, `--jobs` and `--address`.

    Raises:
        ValueError: If the arguments do not fit each other.
        ImportError: If Ray is asked for and not installed.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least one cell must run at a time")
    if name == "ray":
        from .ray import RayEngine

        return RayEngine(address=address, jobs=jobs)
    if name != "local":
        raise ValueError(f"--engine {name}: there are 'local' and 'ray'")
    if address is not None:
        raise ValueError(f"--address {address}: only --engine ray has one")
    from .local import LocalEngine

    return LocalEngine(jobs=jobs or 1)
