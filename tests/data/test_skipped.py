import os
import subprocess
from pathlib import Path

import pytest

from data.choose import choose
from data.documents import DocumentWriter
from data.ingest import Account, check_budget, ingest
from data.sources.base import Reading
from data.sources.sysdocs import SysdocsSource
from data.sources.tree import GitSource, TreeSource
from infra.errors import HeadwaterError

READING = Reading(max_document_bytes=10**6)


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"words of {name}", "utf-8")
    return root


def take(source, tmp_path: Path) -> Account:
    choice = choose([source], 0, READING)
    manifest = {name: sha256 for name, _, sha256 in choice.manifest()}
    with DocumentWriter(tmp_path / "documents") as writer:
        return ingest(choice, Reading(), 0, writer, manifest)


def close_folders(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Deny listing folders of that name, as permissions do to everyone but root."""
    scandir = os.scandir

    def denied(path):
        if os.fspath(path).endswith(name):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)


def test_what_names_leave_out_is_counted_by_reason(tmp_path: Path):
    names = (
        "a.md",
        "picture.png",
        "notes",
        "build/x.txt",
        "venv/lib/y.py",
        ".git2/z.md",
        "__pycache__/w.txt",
    )
    root = write(tmp_path / "in", *names)
    (root / "elsewhere").symlink_to(write(tmp_path / "other", "o.txt"))
    account = take(TreeSource(root), tmp_path)
    summary = account.summary()
    assert (summary["read"], summary["kept"], summary["skipped_by_name"]) == (1, 1, 5)
    assert summary["skipped_by_reason"] == {
        "unknown suffix": 1,
        "no suffix": 1,
        "folder named build": 1,
        "folder named venv": 1,
        "link to a folder": 1,
    }
    check_budget(account, 0)


def test_git_counts_what_it_tracks_and_names_leave_out(tmp_path: Path):
    root = write(tmp_path / "repo", "a.md", "b.png", "untracked")
    for command in (["init", "-q"], ["add", "a.md", "b.png"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    assert dict(take(GitSource(root), tmp_path).skipped) == {"unknown suffix": 1}


def test_a_corpus_without_suffixes_says_what_was_skipped(tmp_path: Path):
    root = write(tmp_path / "in", *(f"text{i:02d}" for i in range(30)))
    account = take(TreeSource(root), tmp_path)
    with pytest.raises(
        HeadwaterError, match=r"30 files or folders .*in/text00 \(no suffix\).*suffix such as"
    ):
        check_budget(account, 0.1)


def test_what_is_skipped_is_part_of_the_scan(tmp_path: Path):
    root = write(tmp_path / "in", "a.md", "b.png")
    choice = choose([TreeSource(root)], 0, READING)
    before = choice.manifest()
    (root / "b.png").rename(root / "c.png")
    assert choose([TreeSource(root)], 0, READING).manifest() == before  # counted, not named
    write(root, "d.png")
    assert choose([TreeSource(root)], 0, READING).manifest() != before
    digests = {name: sha256 for name, _, sha256 in before}
    with DocumentWriter(tmp_path / "out") as writer:
        with pytest.raises(HeadwaterError, match="came or went"):
            ingest(choose([TreeSource(root)], 0, READING), Reading(), 0, writer, digests)


@pytest.mark.parametrize("kind", [TreeSource, SysdocsSource])
def test_a_closed_folder_is_quarantined(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write(tmp_path / "in", "a.md", "closed/b.md", "open/c.md")
    close_folders(monkeypatch, "/closed")
    account = take(kind(root), tmp_path)
    assert (account.read, account.kept, dict(account.quarantined)) == (3, 2, {"unreadable": 1})
    ((_, _, path, reason),) = account.rejected
    assert (Path(path).name, reason) == ("closed", "unreadable: Permission denied")


@pytest.mark.parametrize("kind", [TreeSource, SysdocsSource])
def test_a_folder_that_can_be_listed_but_not_entered(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write(tmp_path / "in", "a.md", "sealed/b.md", "sealed/readme", "sealed/deep/c.md")
    stat, lstat = os.stat, os.lstat

    def denied(real):
        def look(path, *args, **kwargs):
            if "/sealed/" in os.fspath(path):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path, *args, **kwargs)

        return look

    monkeypatch.setattr(os, "stat", denied(stat))
    monkeypatch.setattr(os, "lstat", denied(lstat))
    names = [one.name.partition("/")[2] for one in kind(root).candidates() if one.problem]
    assert names[:3] == ["sealed/b.md", "sealed/deep/c.md", "sealed/readme"]


def test_a_source_that_cannot_be_listed_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write(tmp_path / "in", "a.md")
    close_folders(monkeypatch, "/in")
    with pytest.raises(HeadwaterError, match=r"cannot list the folder .*/in: Permission denied\. Make it"):
        TreeSource(root).candidates()
