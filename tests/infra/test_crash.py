"""Real processes that are killed, stopped, raced or run out of disk; what they leave behind."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.artifact import Artifact
from infra.errors import DiskFull, disk_full_told
from infra.faults import POINTS
from infra.store import Store, open_store
from infra.verify import verify
from tests.infra.forge import Forge

TRAIN = {"steps": 6, "every": 2}


def prepare(forging: Forge, home: Path) -> Store:
    """A store that holds the words and has a name and a run file to be replaced."""
    assert forging.run(home, "words")["status"] == "built"
    return open_store(home)


def words_ref(store: Store) -> str:
    return next(ref for ref in store.refs() if ref.startswith("words@"))


def whole(store: Store, stage: str) -> list[Artifact]:
    """The artifacts of a stage, each found to be whole."""
    found = [store.artifact(stage, id) for id in store.ids(stage)]
    for artifact in found:
        assert verify(store, artifact).problems == ()
    folders = store.home / "artifacts" / stage
    assert len(found) == (len(list(folders.iterdir())) if folders.exists() else 0), (
        "a folder that is no artifact"
    )
    return found


@pytest.fixture(scope="module")
def uninterrupted(forging: Forge, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the toy training run when nothing happens."""
    home = tmp_path_factory.mktemp("calm")
    store = prepare(forging, home)
    return forging.run(home, "train", config=TRAIN, inputs={"words": [words_ref(store)]})["digest"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_fault_point_then_run_again(
    point: str, forging: Forge, tmp_path: Path, uninterrupted: str
) -> None:
    store = prepare(forging, tmp_path)
    job = {"config": TRAIN, "inputs": {"words": [words_ref(store)]}}
    died = forging.run(tmp_path, "train", fault=point, **job)
    assert died["signal"] == signal.SIGKILL, "every registered point must be passed by a build"
    published = ("publish.after_rename", "publish.after_cleanup")
    assert len(whole(store, "train")) == (point in published or point.startswith("names."))
    assert {store.resolve("best").stage, store.resolve("run/node").stage} <= {"words", "train"}

    again = forging.run(tmp_path, "train", **job)
    assert again["digest"] == uninterrupted
    assert len(whole(store, "train")) == 1
    assert list((tmp_path / "work").iterdir()) == []
    assert store.resolve("best").ref == store.resolve("run/node").ref == again["ref"]


def test_the_second_checkpoint_torn_resumes_from_the_first(
    forging: Forge, tmp_path: Path, uninterrupted: str
) -> None:
    store = prepare(forging, tmp_path)
    job = {"config": TRAIN, "inputs": {"words": [words_ref(store)]}}
    assert forging.run(tmp_path, "train", fault="checkpoint.during:2", **job)["signal"] == signal.SIGKILL
    again = forging.start(tmp_path, "train", **job)
    ended = again.wait()
    assert (ended["status"], ended["digest"]) == ("resumed", uninterrupted)
    assert "resumed at step 2" in [event.get("message") for event in again.events()]
    assert len(store.resolve(ended["ref"]).record.tries) == 2


def test_twenty_kills_at_random_moments(forging: Forge, tmp_path: Path, uninterrupted: str) -> None:
    moments = random.Random(7)
    kills = finished = 0
    slow = {**TRAIN, "pause": 0.02}
    calm = prepare(forging, tmp_path / "calm")
    began = time.monotonic()
    forging.run(calm.home, "train", config=slow, inputs={"words": [words_ref(calm)]})
    usual = time.monotonic() - began
    while kills < 20:
        home = tmp_path / f"home-{finished}"
        store = prepare(forging, home)
        job = {"config": slow, "inputs": {"words": [words_ref(store)]}}
        while True:
            running = forging.start(home, "train", **job)
            if kills < 20:
                time.sleep(moments.uniform(0, usual))
                running.kill(signal.SIGKILL)
            ended = running.wait()
            found = whole(store, "train")
            assert len(found) <= 1
            if ended["signal"] == 0:
                break
            kills += 1
        assert [one.digest for one in found] == [ended["digest"]] == [uninterrupted]
        finished += 1


@pytest.mark.parametrize("force", [False, True])
def test_two_at_once_build_once(force: bool, forging: Forge, tmp_path: Path) -> None:
    store = prepare(forging, tmp_path)
    job = {"config": {**TRAIN, "pause": 0.1}, "inputs": {"words": [words_ref(store)]}}
    before = [forging.run(tmp_path, "train", **job)["ref"]] if force else []
    first = forging.start(tmp_path, "train", force=force, **job)
    first.until("progress")
    # Held still, so that the second surely comes while the first is at work.
    first.kill(signal.SIGSTOP)
    second = forging.start(tmp_path, "train", force=force, **job)
    second.until(f"waiting for process {first.pid} on ")
    first.kill(signal.SIGCONT)
    ended = [first.wait(), second.wait()]
    assert [one["status"] for one in ended] == ["built", "cached"]
    assert ended[0]["ref"] == ended[1]["ref"]
    assert {one.ref for one in whole(store, "train")} == {*before, ended[0]["ref"]}


@pytest.mark.parametrize(("number", "named"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_stopped_says_how_to_resume_and_resumes(
    number: int, named: str, forging: Forge, tmp_path: Path, uninterrupted: str
) -> None:
    store = prepare(forging, tmp_path)
    job = {"inputs": {"words": [words_ref(store)]}}
    running = forging.start(tmp_path, "train", config={**TRAIN, "pause": 0.1}, **job)
    running.until("progress")
    running.kill(number)
    ended = running.wait()
    assert (ended["error"], ended["exit_code"]) == ("BuildInterrupted", 130)
    assert named in ended["message"]
    assert "Run the same command again to resume" in ended["message"]
    assert store.ids("train") == []
    again = forging.run(tmp_path, "train", config=TRAIN, **job)
    assert (again["status"], again["digest"]) == ("resumed", uninterrupted)


def test_the_disk_that_is_full_is_the_one_named(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=f"no space left while sorting: {tmp_path}/spill has "):
        with disk_full_told(tmp_path, "sorting"):
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "spill" / "1.tmp"))
    # Libraries written in Rust and C++ keep the text and lose the number.
    with pytest.raises(DiskFull, match=f"no space left while saving: {tmp_path} has "):
        with disk_full_told(tmp_path, "saving"):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"), disk_full_told(tmp_path, "saving"):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    with pytest.raises(OSError, match="Permission"), disk_full_told(tmp_path, "saving"):
        raise OSError(errno.EACCES, "Permission denied")


def check_disk_full(ended: dict[str, object], home: Path) -> None:
    """The error names the folder, the bytes left and what to do; nothing is published; scratch is kept."""
    assert ended["error"] == "DiskFull"
    for part in (str(home), "bytes free", "headwater gc", "HEADWATER_HOME"):
        assert part in str(ended["message"])
    assert open_store(home).refs() == []
    (work,) = (home / "work").iterdir()
    assert (work / "scratch" / "progress").read_text() == "kept"
    assert not (work / "payload").exists(), "its space is given back"


def test_a_full_device(forging: Forge, tmp_path: Path) -> None:
    check_disk_full(forging.run(tmp_path, "fill", config={"how": "device"}), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB, where this user may mount one."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not (mount and umount) or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs; the full device is tested all the same")
    try:
        yield folder
    finally:
        subprocess.run([umount, str(folder)], check=True)


@pytest.mark.parametrize(("how", "mebibytes"), [("write", 3), ("leave-nothing", 1)])
def test_a_full_disk_then_room_again(how: str, mebibytes: int, forging: Forge, small_disk: Path) -> None:
    config = {"how": how, "mebibytes": mebibytes}
    check_disk_full(forging.run(small_disk, "fill", config=config), small_disk)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = forging.run(small_disk, "fill", config={**config})
    if how == "leave-nothing":
        # It fills whatever there is; what matters is that the small disk's try changed nothing.
        assert again["error"] == "DiskFull"
    else:
        assert again["status"] == "resumed"
        assert len(whole(open_store(small_disk), "fill")) == 1
