"""Atomic writes and deterministic formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import HeadwaterError
from infra.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    read_json,
    read_tensors_metadata,
    sha256_bytes,
    sha256_file,
    write_parquet,
    write_tensors,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = atomic_write_bytes(tmp_path / "deep" / "file", b"old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_json_is_sorted_and_read_back(tmp_path: Path) -> None:
    path = atomic_write_json(tmp_path / "a.json", {"b": [1, 0.1], "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": [\n    1,\n    0.1\n  ]\n}\n'
    assert read_json(path) == {"a": "é", "b": [1, 0.1]}
    path.write_text("{")
    for name in ("a.json", "none.json"):
        with pytest.raises(HeadwaterError, match=name):
            read_json(tmp_path / name)


@given(st.binary(max_size=100))
@settings(max_examples=20)
def test_hashes_agree(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("hash") / "f"
    path.write_bytes(data)
    assert sha256_file(path) == sha256_bytes(data)


def test_parquet_bytes_depend_on_the_rows_alone(tmp_path: Path) -> None:
    columns = {"id": [f"{i:05d}" for i in range(20000)], "n": [[i, i + 1] for i in range(20000)]}
    plain = pa.table(columns)
    # The same rows as another producer would hand them over: in chunks, with its own metadata.
    marked = pa.concat_tables([plain.slice(0, 7), plain.slice(7)]).replace_schema_metadata(
        {"pandas": "version 9"}
    )
    one, two = write_parquet(tmp_path / "a.parquet", plain), write_parquet(tmp_path / "b.parquet", marked)
    assert one.read_bytes() == two.read_bytes()
    found = pq.ParquetFile(one)
    assert found.read().to_pydict() == columns
    assert found.metadata.num_row_groups == 2
    assert found.metadata.row_group(0).column(0).compression == "ZSTD"


def test_tensors_are_deterministic_and_exact(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "w": base,
        "t": base.T,
        "tied": base,
        "row": base[1],
        "n": torch.tensor([1, 2], dtype=torch.int32),
    }
    notes = {f"key{i}": i for i in range(20)}
    one = write_tensors(tmp_path / "a.safetensors", tensors, notes)
    again = write_tensors(
        tmp_path / "b.safetensors", dict(reversed(tensors.items())), dict(reversed(notes.items()))
    )
    assert one.read_bytes() == again.read_bytes()
    assert read_tensors_metadata(one) == notes
    loaded = safetensors.torch.load_file(one)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    assert read_tensors_metadata(write_tensors(tmp_path / "c.safetensors", {"w": base})) == {}


def test_numpy_and_torch_give_the_same_file(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    one = write_tensors(tmp_path / "a", {"x": array})
    two = write_tensors(tmp_path / "b", {"x": torch.from_numpy(array.copy())})
    assert one.read_bytes() == two.read_bytes()
