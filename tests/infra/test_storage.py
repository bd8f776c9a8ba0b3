"""The lock and the commit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infra.storage import LocalStorage

ROOT = Path(__file__).resolve().parents[2]
# Holds a lock, forks a child that outlives it, and says so; then waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from infra.storage import LocalStorage
with LocalStorage(Path(sys.argv[1])).lock("x"):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        time.sleep(30)
        os._exit(0)
    time.sleep(30)
"""


def test_a_lock_dies_with_its_process_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with holder:
        child = int(holder.stdout.readline())
        try:
            with storage.lock("x", wait=False) as free:
                assert not free
            holder.kill()
            holder.wait()
            os.kill(child, 0)
            with storage.lock("x", wait=False) as free:
                assert free
        finally:
            os.kill(child, 9)


def test_waiting_tells_who_holds_it(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    told: list[str] = []
    order: list[str] = []

    def second() -> None:
        with storage.lock("x", waiting=told.append):
            order.append("second")

    with storage.lock("x"):
        thread = threading.Thread(target=second)
        thread.start()
        end = time.monotonic() + 5
        while not told and time.monotonic() < end:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert len(told) == 1
    assert told[0].startswith(f"process {os.getpid()} on ")


def test_other_names_are_other_locks(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with storage.lock("x"), storage.lock("y", wait=False) as free:
        assert free


def test_commit_is_all_or_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "f").write_text(name)
    calls: list[bool] = []
    target = tmp_path / "artifacts" / "s" / "1"
    storage.commit(tmp_path / "work" / "one", "artifacts/s/1", lambda: calls.append(target.exists()))
    assert calls == [False]
    with pytest.raises(FileExistsError):
        storage.commit(tmp_path / "work" / "two", "artifacts/s/1")
    assert (target / "f").read_text() == "one"
    assert (tmp_path / "work" / "two" / "f").exists()


def test_documents(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert storage.read("names/a.json") is None
    storage.replace("names/a.json", b"1")
    storage.replace("names/a.json", b"2")
    storage.replace("names/b/c.json", b"3")
    (tmp_path / "names" / ".a.json.tmp-1").write_bytes(b"torn")
    assert storage.read("names/a.json") == b"2"
    assert storage.keys("names", ".json") == ["names/a.json", "names/b/c.json"]
    assert storage.keys("nowhere", ".json") == []
