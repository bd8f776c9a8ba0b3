import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.choose import choose
from data.documents import Document, DocumentWriter
from data.ingest import Account, check_budget, ingest
from data.sources import tree
from data.sources.arrow import DatasetsSource
from data.sources.base import Reading, Source
from data.sources.tree import FileSource, TreeSource
from infra.errors import HeadwaterError


def take(source: Source, tmp_path: Path, max_bytes: int = 0, reading: Reading | None = None) -> Account:
    reading = reading or Reading()
    choice = choose([source], max_bytes, reading)
    with DocumentWriter(tmp_path / "documents") as writer:
        return ingest(choice, reading, max_bytes, writer)


def damaged_parquet(path: Path, groups: int = 4, rows: int = 1000) -> Path:
    """Row group 2 overwritten; the others and the footer are whole."""
    text = [f"row {i} {os.urandom(20).hex()}" for i in range(groups * rows)]
    pq.write_table(pa.table({"text": text}), path, row_group_size=rows, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    with path.open("r+b") as handle:
        handle.seek(column.data_page_offset)
        handle.write(b"\xff" * column.total_compressed_size)
    return path


def lines(count: int) -> bytes:
    return b"".join(b'{"text": "%d %s"}\n' % (i, os.urandom(30).hex().encode()) for i in range(count))


def arrow(folder: Path, batches: int = 20, rows: int = 100) -> DatasetsSource:
    folder.mkdir()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file:
        schema = pa.schema([("text", pa.string())])
        with pa.ipc.new_stream(file, schema) as stream:
            for batch in range(batches):
                stream.write_batch(pa.record_batch({"text": [f"{batch} {row} words" for row in range(rows)]}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}), "utf-8")
    return DatasetsSource(str(folder))


def test_every_row_of_a_damaged_row_group_counts_and_the_next_is_read(tmp_path: Path):
    account = take(FileSource(damaged_parquet(tmp_path / "a.parquet")), tmp_path)
    assert (account.read, account.kept, account.quarantined.total()) == (4000, 3000, 1000)
    assert [path for _, _, path, _ in account.rejected] == ["a.parquet#2000-2999"]
    check_budget(account, 0.26)
    with pytest.raises(HeadwaterError, match=r"1000 of 4000 documents could not be read \(25\.0%"):
        check_budget(account, 0.24)


def test_a_damaged_row_group_weighs_the_same_in_a_sample(tmp_path: Path):
    path = damaged_parquet(tmp_path / "a.parquet")
    account = take(FileSource(path), tmp_path, max_bytes=20_000)
    assert account.read == 4000
    assert 50 < account.quarantined.total() < 150
    check_budget(account, 0.4)
    with pytest.raises(HeadwaterError, match="could not be read"):
        check_budget(account, 0.1)


def test_rows_without_the_field_of_text_count_one_by_one(tmp_path: Path):
    pq.write_table(pa.table({"body": ["x"] * 70}), tmp_path / "a.parquet")
    assert take(FileSource(tmp_path / "a.parquet"), tmp_path).quarantined.total() == 70


def test_a_reader_that_loses_a_record_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}', "utf-8")
    read_file = tree.read_file
    for name in ("a.parquet", "b.jsonl"):
        assert take(FileSource(tmp_path / name), tmp_path).read == 2
        with monkeypatch.context() as patch:
            patch.setattr(tree, "read_file", lambda *given: list(read_file(*given))[1:])
            with pytest.raises(AssertionError, match=f"2 documents read up to {name}, but 1 kept"):
                take(FileSource(tmp_path / name), tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("left", [0.02, 0.5, 0.97])
def test_packed_lines_that_are_cut_off_fail_the_budget(tmp_path: Path, suffix: str, left: float):
    raw = lines(5000)
    packed = gzip.compress(raw) if suffix == ".gz" else pa.compress(raw, "zstd", asbytes=True)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: int(left * len(packed))])
    account = take(FileSource(path), tmp_path)
    assert account.quarantined == {"unreadable": 1}
    with pytest.raises(HeadwaterError, match=r"(damaged or cut off|could not be read).*First: a\.jsonl"):
        check_budget(account, 0.1)


def test_one_torn_file_of_many_alike_is_within_the_budget(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    packed = gzip.compress(lines(200))
    for i in range(30):
        (root / f"{i:02d}.jsonl.gz").write_bytes(packed if i else packed[: len(packed) // 50])
    account = take(TreeSource(root), tmp_path)
    check_budget(account, 0.05)  # one of thirty, though what is left of it is next to nothing
    with pytest.raises(HeadwaterError, match="damaged or cut off"):
        check_budget(account, 0.03)


@pytest.mark.parametrize(("at", "budget"), [(20, 0.55), (36, 0.15)])
def test_damage_in_packed_lines_is_weighed_by_the_bytes_beyond(tmp_path: Path, at: int, budget: float):
    parts = [gzip.compress(lines(500)) for _ in range(40)]
    parts[at] = b"??" + parts[at][2:]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(parts))
    account = take(FileSource(tmp_path / "a.jsonl.gz"), tmp_path)
    assert account.kept == at * 500
    check_budget(account, budget)
    with pytest.raises(HeadwaterError, match="damaged or cut off"):
        check_budget(account, budget - 0.1)


def test_arrow_that_is_cut_off_fails_the_budget_even_between_batches(tmp_path: Path):
    source = arrow(tmp_path / "set")
    assert take(source, tmp_path).kept == 2000
    path = tmp_path / "set" / "data.arrow"
    whole = path.read_bytes()
    ends = [place for place in range(8, len(whole) - 8, 8) if whole[place : place + 4] == b"\xff" * 4]
    for left in (len(whole) // 2, ends[10]):
        path.write_bytes(whole[:left])
        account = take(source, tmp_path)
        assert 0 < account.kept < 2000
        assert account.quarantined == {"unreadable": 1}
        with pytest.raises(HeadwaterError, match="damaged or cut off"):
            check_budget(account, 0.1)


def test_a_parquet_without_its_footer_weighs_what_it_is(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.txt").write_text("words " * 100, "utf-8")
    for i in range(40):
        (root / f"{i:02d}.txt").write_text("few words", "utf-8")
    whole = damaged_parquet(tmp_path / "whole.parquet").read_bytes()
    (root / "b.parquet").write_bytes(whole[: len(whole) // 2])
    account = take(TreeSource(root), tmp_path)
    assert account.quarantined == {"unreadable": 1}
    with pytest.raises(HeadwaterError, match="1 files are damaged or cut off"):
        check_budget(account, 0.5)


def test_documents_of_whole_row_groups_are_those_of_the_file(tmp_path: Path):
    path = tmp_path / "a.parquet"
    text = [f"row {i}" for i in range(1000)]
    pq.write_table(pa.table({"text": text}), path, row_group_size=300)
    source = FileSource(path)
    found = list(source.read(source.candidates()[0], Reading()))
    assert [(one.path, one.text) for one in found if isinstance(one, Document)] == [
        (f"a.parquet#{i}", text[i]) for i in range(1000)
    ]
