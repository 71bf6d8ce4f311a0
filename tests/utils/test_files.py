"""Atomic writes and locks."""

import subprocess
import sys

import pytest

from peft_steer.utils.files import atomic_path, remove_partial, try_lock, write_json


def test_a_file_keeps_its_suffix_and_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with atomic_path(path) as partial:
        assert partial.name == "table.csv"
        partial.write_text("a,b")
        assert not path.exists()
    assert path.read_text() == "a,b"
    assert list(path.parent.iterdir()) == [path]
    write_json(path, [1])
    assert path.read_text() == "[\n 1\n]"


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, 1)

    def fail():
        with atomic_path(path) as partial:
            partial.write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_have_the_usual_permissions(tmp_path):
    with atomic_path(tmp_path / "adapter") as folder:
        folder.mkdir()
        (folder / "weights").write_bytes(b"1")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "adapter").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_the_leftovers_of_a_name_are_removed(tmp_path):
    (tmp_path / "a.json.x1.partial").mkdir()
    (tmp_path / "a.json.x1.partial" / "a.json").write_text("ha")
    (tmp_path / "b.json.x1.partial").mkdir()
    remove_partial(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["b.json.x1.partial"]


def test_a_lock_is_held_against_other_processes(tmp_path):
    lock = try_lock(tmp_path / "locks" / "one")
    ask = "import sys, filelock; filelock.FileLock(sys.argv[1], blocking=False).acquire()"
    call = [sys.executable, "-c", ask, str(tmp_path / "locks" / "one")]
    assert subprocess.run(call, capture_output=True).returncode != 0
    assert try_lock(tmp_path / "locks" / "two") is not None
    lock.release()
    assert subprocess.run(call, capture_output=True).returncode == 0
