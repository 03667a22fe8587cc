"""Who holds a lock is named; what a dead process left is taken over, and what cannot be told is refused."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from stdist import locks
from stdist.errors import InputError
from stdist.locks import WriterLock

HOLD = "import sys, time; from pathlib import Path; from stdist.locks import WriterLock\n"
HOLD += "lock = WriterLock(Path(sys.argv[1]), Path('runs/a')); print('held', flush=True); time.sleep(600)"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(path):
    return WriterLock(path, "runs/a")


def no_locks(*_arguments):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("with_locks", [True, False])
def test_a_live_owner_is_named_and_a_killed_one_is_followed(path, holder, monkeypatch, with_locks):
    """Whether or not the file system knows locks."""
    if not with_locks:
        monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    who = (
        rf"^runs/a is being written by process {holder.pid} on {platform.node()} \(since 20.*\); wait for it or choose"
    )
    with pytest.raises(InputError, match=who):
        take(path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert path.exists()
    with take(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_the_same_process_does_not_hold_it_twice(path):
    with take(path), pytest.raises(InputError, match=f"by process {os.getpid()}"):
        take(path)
    take(path).close()


def leave(path, **changes):
    """What an owner that was killed leaves behind."""
    with take(path):
        note = json.loads(path.read_text())
    path.write_text(json.dumps(note | changes))


@pytest.mark.parametrize("with_locks", [True, False])
def test_another_machine_is_never_taken_for_dead(path, monkeypatch, with_locks):
    if not with_locks:
        monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    leave(path, host="node7", boot="of node7", pid=12)
    how = rf"last written by process 12 on node7 .*; if it has ended, delete {path} and try again"
    with pytest.raises(InputError, match=how):
        take(path)
    path.unlink()
    take(path).close()


@pytest.mark.parametrize("with_locks", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"boot": "the one before"}, id="this machine, before it was started again"),
        pytest.param({"host": "a container that is gone", "pid": 2**22 + 1}, id="a container of this machine"),
        pytest.param({"started": 1.0}, id="a process whose number another one has"),
    ],
)
def test_what_a_dead_owner_left_is_followed(path, monkeypatch, with_locks, changes):
    if not with_locks:
        monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    leave(path, **changes)
    with take(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0\0"])
def test_a_note_that_was_cut_short_is_no_owner(path, text):
    path.write_text(text)
    take(path).close()


def test_a_holder_that_removes_the_file_meanwhile_is_followed(path, monkeypatch):
    """Between the opening and the lock: else two would hold two files of one name."""
    first, flock = take(path), locks.fcntl.flock

    def flock_after_the_other_has_gone(file, how):
        if path.exists() and json.loads(path.read_text() or "{}").get("pid"):
            first.close()
        flock(file, how)

    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", flock_after_the_other_has_gone)
        second = take(path)
    with pytest.raises(InputError, match="is being written"):
        take(path)
    second.close()


def test_a_folder_that_was_removed_with_its_lock_is_no_error(tmp_path):
    (tmp_path / "work").mkdir()
    lock = take(tmp_path / "work" / "lock")
    (tmp_path / "work" / "lock").unlink()
    (tmp_path / "work").rmdir()
    lock.close()
