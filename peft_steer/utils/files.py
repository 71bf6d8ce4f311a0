"""Writing so that no reader sees half a file, and locks between processes.

Writes are atomic: a file or a folder is complete or absent, even after a kill.

Locks are `flock`'s: they hold between all processes of a machine, and between machines where the mount has locks
(NFSv4, NFSv3 with lockd, Lustre with `-o flock`); there a dead machine's locks end with its lease, after a minute or
two. On a file system without locks, `filelock` falls back to files that merely exist, and warns.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


_PARTIAL = ".partial"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, of the same name and suffix; when the block ends without an error, what
    is there is synced to disk and takes the place of `path`. A folder takes the place of an empty one only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.", suffix=_PARTIAL))
    try:
        partial = workspace / path.name
        yield partial
        for file in (partial, *partial.rglob("*")):
            _sync(file)
        os.replace(partial, path)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=1))


def remove_partial(path: Path) -> None:
    """Removes what writers of `path` left behind when they were killed. Only for the holder of its lock."""
    for workspace in path.parent.glob(f"{path.name}.*{_PARTIAL}"):
        shutil.rmtree(workspace)


def try_lock(path: Path) -> FileLock | None:
    """The lock in the file `path`, acquired, or None while another process holds it. The operating system releases it
    when its holder dies; any thread may release it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except TimeoutError:
        return None
    return lock


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
