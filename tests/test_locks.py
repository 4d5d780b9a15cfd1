"""Locks: one holder, who is named; none outlives its process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lm_saes.errors import CacheError, RunFolderError
from lm_saes.locks import exclusive

HOLDER = "import sys, time\nfrom pathlib import Path\nfrom lm_saes.locks import exclusive\nwith exclusive(Path(sys.argv[1]), 'it'):\n    print('held', flush=True)\n    time.sleep(600)"


def test_a_second_one_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    with exclusive(tmp_path / ".lock", "the run in x") as former:
        assert former is None
        wanted = (
            rf"^the run in x is being written by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d .*; wait for it, stop it"
        )
        with pytest.raises(RunFolderError, match=wanted), exclusive(tmp_path / ".lock", "the run in x"):
            pass
        with pytest.raises(CacheError), exclusive(tmp_path / ".lock", "a cache", error=CacheError):
            pass
        with exclusive(tmp_path / ".other", "something else"):
            pass
    with exclusive(tmp_path / ".lock", "the run in x") as former:
        assert former is None, "it was given back"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match=f"by process {holder.pid} on"), exclusive(path, "it"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with exclusive(path, "it") as former:
        assert former is not None
        assert (former.process, former.host) == (holder.pid, socket.gethostname())
    with exclusive(path, "it") as former:
        assert former is None


def test_whatever_stands_in_the_owners_file_is_no_obstacle(tmp_path: Path) -> None:
    for text in ("", "[]", '{"host": 1}', "\x00\xff"):
        (tmp_path / ".lock.json").write_text(text)
        with exclusive(tmp_path / ".lock", "it") as former:
            assert former is None


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr("lm_saes.locks.FileLock.acquire", refused)
    wanted = r"^the run in x cannot be written: Permission denied \(.*\.lock\); choose another"
    with pytest.raises(RunFolderError, match=wanted), exclusive(tmp_path / ".lock", "the run in x"):
        pass
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.write_text", refused)  # the lock is held by then
    with pytest.raises(RunFolderError, match="cannot be written"), exclusive(tmp_path / ".lock", "the run in x"):
        pass
    monkeypatch.undo()
    with exclusive(tmp_path / ".lock", "the run in x") as former:
        assert former is None


def test_a_folder_that_is_gone_meanwhile_hides_no_other_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    def fail() -> None:
        with exclusive(tmp_path / "run" / ".lock", "the run in run"):
            shutil.rmtree(tmp_path / "run")
            raise KeyError("another")

    with pytest.raises(KeyError, match="another"):
        fail()
