"""What a cap takes where files weigh other than their size says."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.choose import choose
from data.documents import Document, DocumentWriter, iter_documents
from data.ingest import Account, check_budget, ingest
from data.sources.base import Reading
from data.sources.tree import TreeSource
from infra.errors import HeadwaterError


def take(root: Path, max_bytes: int) -> tuple[Account, list[Document]]:
    choice = choose([TreeSource(root)], max_bytes, Reading())
    with DocumentWriter(root.parent / "documents") as writer:
        account = ingest(choice, Reading(), max_bytes, writer)
    return account, list(iter_documents(root.parent / "documents"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def records(count: int, size: int = 40) -> bytes:
    return b"".join(json.dumps({"text": f"{i:06d} " + "x" * size}).encode() + b"\n" for i in range(count))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".jsonl.zst"])
def test_packed_files_give_an_even_share_each(root: Path, suffix: str):
    for name in "abcdef":
        path = root / f"{name}{suffix}"
        text = [f"{name} {i} " + "well packed " * 160 for i in range(200)]
        raw = b"".join(json.dumps({"text": one}).encode() + b"\n" for one in text)
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": text}), path, compression="zstd")
        else:
            packed = gzip.compress(raw) if suffix.endswith(".gz") else pa.compress(raw, "zstd", asbytes=True)
            path.write_bytes(packed)
    account, documents = take(root, 600_000)
    counts = {name: sum(one.path.startswith(f"in/{name}.") for one in documents) for name in "abcdef"}
    assert min(counts.values()) >= 25
    assert max(counts.values()) <= 80
    assert account.kept_bytes > 500_000


def test_texts_packed_with_zstd_weigh_what_they_unpack_to(root: Path):
    for i in range(50):
        text = f"{i} " * 3000
        (root / f"{i}.txt.zst").write_bytes(pa.compress(text.encode(), "zstd", asbytes=True))
    choice = choose([TreeSource(root)], 30_000, Reading())
    assert 2 <= len(choice.files) <= 4


def test_one_enormous_line_does_not_shrink_the_sample_of_the_rest(root: Path):
    (root / "a.jsonl").write_bytes(records(4000))
    without, _ = take(root, 20_000)
    with (root / "a.jsonl").open("ab") as handle:
        handle.truncate(handle.tell() + 210_000_000)  # a last line of 210 MB, taking no room on the disk
    account, _ = take(root, 20_000)
    assert account.quarantined == {"larger than max_document_bytes": 1}
    assert account.kept == without.kept > 200
    check_budget(account, 0.001)


def test_too_large_is_compared_with_all_records_and_not_with_the_sample(root: Path):
    (root / "a.jsonl").write_bytes(records(4000) + (b"x" * 6_000_000 + b"\n"))
    account, _ = take(root, 700)  # about ten documents
    assert account.kept < 30
    check_budget(account, 0.001)
    with pytest.raises(HeadwaterError, match=r"of all"):
        check_budget(account, 0.0001)


def test_an_enormous_text_is_always_counted_and_harmless(root: Path):
    for i in range(100):
        (root / f"{i:03d}.txt").write_text(f"{i} " * 300, "utf-8")
    with (root / "huge.txt").open("wb") as handle:
        handle.truncate(210_000_000)
    account, _ = take(root, 5000)
    assert account.quarantined == {"larger than max_document_bytes": 1}
    assert 3 <= account.kept <= 6
    check_budget(account, 0.02)
    with pytest.raises(HeadwaterError, match="of all"):
        check_budget(account, 0.005)


def test_the_share_of_records_is_part_of_the_scan(root: Path):
    (root / "a.jsonl").write_bytes(records(1000))
    for i in range(10):
        (root / f"{i}.txt").write_text("words " * 100, "utf-8")
    before = choose([TreeSource(root)], 10_000, Reading())
    # Another file that is not chosen changes how much is taken of the records.
    (root / "more.txt").write_text(str(random.Random(0).random()) * 1000, "utf-8")
    after = choose([TreeSource(root)], 10_000, Reading())
    share = [
        {one.candidate.name: one.share for one in choice.files}["in/a.jsonl"] for choice in (before, after)
    ]
    assert share[1] < share[0] < 1
    names = [{name for name, _, _ in choice.manifest()} for choice in (before, after)]
    assert not any(name.startswith("folder:in/a.jsonl") for name in names[0] & names[1])
