from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data.loader import ShardLoader
from data.packing import Rows
from data.shards import ShardReader, ShardWriter
from infra.errors import HeadwaterError

T = 8


def make_rows(start: int, count: int) -> Rows:
    tokens = (np.arange(start, start + count)[:, None] * 10 + np.arange(T)).astype(np.int32)
    return Rows(tokens, np.zeros_like(tokens), np.ones(tokens.shape, np.uint8))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path / "train", T, tokens_per_shard=5 * T)
    writer.add(make_rows(0, 3))
    writer.add(make_rows(3, 14))
    assert writer.close() == 17
    return tmp_path / "train"


def test_shards_hold_the_rows_in_order_and_in_bounded_files(shards: Path):
    assert [p.name for p in sorted(shards.iterdir())] == [f"{i:05d}.safetensors" for i in range(4)]
    reader = ShardReader(shards)
    assert (reader.rows, reader.sequence_length) == (17, T)
    order = [16, 0, 5, 5]
    assert np.array_equal(reader.read(order).tokens, make_rows(0, 17).tokens[order])
    with pytest.raises(HeadwaterError, match="out of range"):
        reader.read([17])


def test_writing_twice_gives_the_same_bytes(shards: Path, tmp_path: Path):
    writer = ShardWriter(tmp_path / "again", T, tokens_per_shard=5 * T)
    for i in range(17):
        writer.add(make_rows(i, 1))
    writer.close()
    for path in sorted(shards.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_batches_are_a_function_of_the_step(shards: Path):
    one = ShardLoader(shards, batch_rows=4, seed=7)
    seen = [one.batch(step) for step in range(12)]
    for step in (11, 3, 4, 0):  # a loader made afresh, asked out of order
        batch = ShardLoader(shards, batch_rows=4, seed=7).batch(step)
        assert all(torch.equal(batch[name], seen[step][name]) for name in ("tokens", "segments", "loss"))
    assert seen[0]["tokens"].dtype == torch.int64
    assert seen[0]["loss"].dtype == torch.uint8


def test_each_epoch_sees_every_row_once_in_its_own_order(shards: Path):
    loader = ShardLoader(shards, batch_rows=17, seed=7)
    first, second = (loader.batch(step)["tokens"][:, 0] // 10 for step in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(17))
    assert first.tolist() != second.tolist()
    assert first.tolist() != (ShardLoader(shards, 17, seed=8).batch(0)["tokens"][:, 0] // 10).tolist()


def test_ranks_share_the_batch_without_changing_it(shards: Path):
    whole = ShardLoader(shards, batch_rows=6, seed=1)
    ranks = [ShardLoader(shards, batch_rows=6, seed=1, rank=r, world=3) for r in range(3)]
    for step in range(7):
        parts = torch.stack([rank.batch(step)["tokens"] for rank in ranks], dim=1).reshape(6, T)
        assert torch.equal(parts, whole.batch(step)["tokens"])


def test_a_stream_with_changing_batch_sizes_skips_and_repeats_nothing(shards: Path):
    loader = ShardLoader(shards, batch_rows=1, seed=1)
    start, parts = 0, []
    for count in (2, 4, 8, 20):
        parts.append(loader.stream(start, count)["tokens"])
        start += count
    assert torch.equal(torch.cat(parts), loader.stream(0, start)["tokens"])


def test_wrong_folders_files_and_layouts_are_named(shards: Path, tmp_path: Path):
    with pytest.raises(HeadwaterError, match="no token shards"):
        ShardReader(tmp_path / "nothing")
    with pytest.raises(HeadwaterError, match="multiple of the 2 ranks"):
        ShardLoader(shards, batch_rows=3, world=2)
    with pytest.raises(HeadwaterError, match="rank 2"):
        ShardLoader(shards, batch_rows=4, rank=2, world=2)
    save_file(
        {"tokens": np.zeros((2, T), np.int64), "segments": np.zeros((2, T), np.int32)}
        | {"loss": np.zeros((2, T), np.uint8)},
        shards / "00009.safetensors",
    )
    with pytest.raises(HeadwaterError, match=r"00009\.safetensors: tokens is I64"):
        ShardReader(shards)
    (shards / "00009.safetensors").write_bytes(b"torn")
    with pytest.raises(HeadwaterError, match=r"00009\.safetensors is not a readable"):
        ShardReader(shards)
