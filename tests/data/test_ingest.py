import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.choose import choose, digest
from data.documents import DocumentWriter, iter_documents
from data.ingest import Account, check_budget, ingest, reason_class
from data.sources.base import Reading
from data.sources.tree import FileSource, TreeSource
from infra.errors import HeadwaterError

READING = Reading(max_document_bytes=10**6)


def make_tree(root: Path, files: int, size: int = 1000) -> TreeSource:
    root.mkdir(parents=True)
    for i in range(files):
        (root / f"{i:04d}.txt").write_text(f"{i} " * (size // (len(str(i)) + 1)), "utf-8")
    return TreeSource(root)


def take(sources, tmp_path: Path, max_bytes: int = 0, reading: Reading | None = None) -> tuple[Account, list]:
    reading = reading or Reading()
    chosen = choose(sources, max_bytes, reading)
    manifest = {name: sha256 for name, _, sha256 in chosen.manifest()}
    with DocumentWriter(tmp_path / "documents") as writer:
        account = ingest(chosen, reading, max_bytes, writer, manifest)
    return account, list(iter_documents(tmp_path / "documents")) if account.kept else []


def test_everything_is_accounted_for(tmp_path: Path):
    source = make_tree(tmp_path / "in", 20)
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "empty.txt").write_bytes(b"")
    account, documents = take([source], tmp_path)
    assert (account.read, account.kept, len(documents)) == (22, 20, 20)
    assert dict(account.dropped) == {"empty": 1}
    assert dict(account.quarantined) == {"invalid UTF-8": 1}
    assert account.kept_bytes == sum(len(d.text) for d in documents)
    summary = account.summary()
    assert summary["read"] == summary["kept"] + summary["dropped"] + summary["quarantined"]
    account.kept += 1
    with pytest.raises(AssertionError, match="22 documents read up to"):
        account.check("a.txt")


def test_a_cap_takes_an_even_sample_and_a_larger_cap_more_of_the_same(tmp_path: Path):
    source = make_tree(tmp_path / "in", 200)
    names = lambda cap: [c.candidate.name for c in choose([source], cap, READING).files]  # noqa: E731
    small, large = names(20_000), names(80_000)
    assert 15 <= len(small) <= 20
    assert set(small) < set(large)
    places = sorted(int(Path(name).stem) for name in large)
    assert places[0] < 20
    assert places[-1] > 180
    assert names(20_000) == small
    account, _ = take([source], tmp_path, max_bytes=20_000)
    assert 15_000 < account.kept_bytes <= 20_000


def test_a_cap_is_shared_between_sources(tmp_path: Path):
    little, much = make_tree(tmp_path / "a", 5), make_tree(tmp_path / "b", 100)
    chosen = choose([little, much], 20_000, READING)
    assert sum(c.source is little for c in chosen.files) == 5  # all of it: less than its half
    assert 12 <= sum(c.source is much for c in chosen.files) <= 16
    assert len({c.name for c in chosen.files}) == len(chosen.files)


def test_two_folders_of_one_name_do_not_collide(tmp_path: Path):
    first, second = make_tree(tmp_path / "x" / "src", 3), make_tree(tmp_path / "y" / "src", 3)
    account, documents = take([first, second], tmp_path)
    assert account.kept == 6
    assert len({d.id for d in documents}) == 6
    assert len({c.name for c in choose([first, second], 0, READING).files}) == 6


def test_records_under_a_cap(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    lines = [json.dumps({"text": f"{i:06d}" * 10}) for i in range(3000)]
    (root / "a.jsonl").write_text("\n".join(lines), "utf-8")
    account, documents = take([TreeSource(root)], tmp_path, max_bytes=60_000)
    assert account.read == 3000
    assert 600 < account.kept < 1000
    assert account.kept_bytes <= 60_000
    assert account.dropped["left out under max_bytes"] == 3000 - account.kept
    assert not account.rejected  # counted, not listed one by one
    assert documents[-1].path > "in/a.jsonl#2"  # from the whole file, not its beginning


def test_a_huge_line_is_quarantined_without_being_held(tmp_path: Path):
    root = tmp_path / "in"
    source = make_tree(root, 3)
    with (root / "huge.txt").open("wb") as handle:
        handle.truncate(200_000_000)  # 200 MB in one line, taking no room on the disk
    with (root / "huge.jsonl").open("wb") as handle:
        handle.write(b'{"text": "ok"}\n')
        handle.truncate(200_000_000)
    tracemalloc.start()
    account, _ = take([source], tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert account.kept == 4
    assert dict(account.quarantined) == {"larger than max_document_bytes": 2}
    assert peak < 50_000_000


def test_the_error_budget_names_the_first_files(tmp_path: Path):
    source = make_tree(tmp_path / "in", 8)
    for i in range(2):
        (tmp_path / "in" / f"bad{i}.txt").write_bytes(b"abc\xff")
    account, _ = take([source], tmp_path)
    check_budget(account, 0.2)
    with pytest.raises(HeadwaterError, match=r"2 of 10 .*in/bad\d.txt \(invalid UTF-8 at byte 3\)") as told:
        check_budget(account, 0.1)
    assert "raise error_budget" in str(told.value)


def test_records_that_a_cap_passes_over_do_not_stretch_the_error_budget(tmp_path: Path):
    lines = [json.dumps({"text": f"text {i}"}) if i % 2 else "broken" for i in range(4000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    account, _ = take([FileSource(tmp_path / "rows.jsonl")], tmp_path, max_bytes=1000)
    assert account.read == 4000
    assert 20 < account.quarantined.total() < 80
    with pytest.raises(HeadwaterError, match=r"^\d\d of \d\d documents could not be read \((4|5|6)\d\.\d%"):
        check_budget(account, 0.3)
    check_budget(account, 0.7)


def test_documents_beyond_the_cap_that_were_read_count_as_tried(tmp_path: Path):
    # So well compressed that the file seems to fit under the cap, and every row is read.
    pq.write_table(pa.table({"text": ["x" * 1000] * 40 + [None] * 2}), tmp_path / "rows.parquet")
    account, _ = take([FileSource(tmp_path / "rows.parquet")], tmp_path, max_bytes=10_000)
    assert (account.kept, account.dropped.total(), account.quarantined.total()) == (10, 30, 2)
    check_budget(account, 0.1)


def test_an_empty_corpus_is_an_error(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    account, _ = take([TreeSource(root)], tmp_path)
    with pytest.raises(HeadwaterError, match="no documents"):
        check_budget(account, 0.1)
    (root / "blank.txt").write_text("\n", "utf-8")
    account, _ = take([TreeSource(root)], tmp_path)
    with pytest.raises(HeadwaterError, match=r"1 met: 1 empty.*Check sources"):
        check_budget(account, 0.1)


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path: Path):
    source = make_tree(tmp_path / "in", 2)
    chosen = choose([source], 0, READING)
    digests = {c.name: digest(c)[1] for c in chosen.files}
    (tmp_path / "in" / "0001.txt").write_text("other", "utf-8")
    with DocumentWriter(tmp_path / "documents") as writer:
        with pytest.raises(HeadwaterError, match=r"0001\.txt changed while"):
            ingest(chosen, Reading(), 0, writer, digests)


def test_document_files_are_bounded_and_the_same_each_time(tmp_path: Path):
    source = make_tree(tmp_path / "in", 30)
    chosen = choose([source], 0, READING)
    for name in ("one", "two"):
        with DocumentWriter(tmp_path / name, bytes_per_file=5000) as writer:
            ingest(chosen, Reading(), 0, writer)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(files) >= 6
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [d.path for d in iter_documents(tmp_path / "one")] == [c.candidate.name for c in chosen.files]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("unreadable: No such file", "unreadable"),
        ("invalid UTF-8 at byte 3", "invalid UTF-8"),
        ("larger than max_document_bytes (20)", "larger than max_document_bytes"),
    ],
)
def test_reason_class(reason, kind):
    assert reason_class(reason) == kind
