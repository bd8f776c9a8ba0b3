"""The data stages as the store builds them, one after the other."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data.chat import ChatTokenizer
from data.documents import iter_documents
from data.loader import ShardLoader
from flows.stages import decontaminate, dedup, filter, ingest, pack, tasks, tokenizer
from infra.artifact import Artifact
from infra.build import build
from infra.errors import HeadwaterError
from infra.stage import Stage
from infra.store import Store, open_store

WORDS = """
the of and to be that have with water mountain river forest window letter journey history science music garden
winter summer engine market doctor teacher village harvest lantern bridge captain island season weather animal
""".split()  # noqa: SIM905
Builder = Callable[..., Artifact]


def prose(seed: int, lines: int = 12) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=11)) + ".\n" for _ in range(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw") / "corpus"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02d}.md").write_text(prose(i), "utf-8")
    (root / "copy.md").write_text(prose(0) + "  \n", "utf-8")
    (root / "near.md").write_text(prose(1, 30).replace("water", "waters", 1), "utf-8")
    (root / "short.md").write_text("too short", "utf-8")
    (root / "broken.md").write_bytes(b"\xff\xfe")
    lines = [json.dumps({"text": prose(100 + i)}) for i in range(5)]
    (root / "more.jsonl").write_text("\n".join(lines), "utf-8")
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def make(store: Store) -> Builder:
    def one(
        stage: Stage, inputs: dict[str, list[Artifact]] | None = None, force: bool = False, **config: Any
    ):
        return build(store, stage, stage.config(**config), inputs or {}, force=force).artifact

    return one


@pytest.fixture(scope="module")
def ingested(make: Builder, corpus: Path) -> Artifact:
    return make(ingest.STAGE, sources=str(corpus))


@pytest.fixture(scope="module")
def filtered(make: Builder, ingested: Artifact) -> Artifact:
    return make(filter.STAGE, {"documents": [ingested]})


@pytest.fixture(scope="module")
def deduped(make: Builder, filtered: Artifact) -> Artifact:
    return make(dedup.STAGE, {"documents": [filtered]})


@pytest.fixture(scope="module")
def problems(make: Builder) -> Artifact:
    families = {"addition": {"train": 60, "held_out": 10, "size": 2}, "sorting": {"train": 60, "size": 4}}
    return make(tasks.STAGE, families=families)


@pytest.fixture(scope="module")
def cleaned(make: Builder, deduped: Artifact, problems: Artifact) -> Artifact:
    return make(decontaminate.STAGE, {"documents": [deduped], "evaluation": [problems]})


@pytest.fixture(scope="module")
def trained(make: Builder, cleaned: Artifact, problems: Artifact) -> Artifact:
    inputs = {"documents": [cleaned], "problems": [problems]}
    return make(tokenizer.STAGE, inputs, vocab_size=400, sample_bytes=20_000)


@pytest.fixture(scope="module")
def packing(cleaned: Artifact, problems: Artifact, trained: Artifact) -> dict[str, Any]:
    return {
        "inputs": {"documents": [cleaned], "problems": [problems], "tokenizer": [trained]},
        "sequence_length": 128,
        "token_budget": 12_000,
        "mixture": {"text": 0.5, "addition": 0.25, "sorting": 0.25},
    }


@pytest.fixture(scope="module")
def packed(make: Builder, packing: dict[str, Any]) -> Artifact:
    return make(pack.STAGE, **packing)


def test_ingest_accounts_for_every_document(ingested: Artifact):
    stats = ingested.json("stats.json")
    assert (stats["read"], stats["kept"], stats["dropped"], stats["quarantined"]) == (49, 48, 0, 1)
    assert ingested.metrics["documents"] == 48
    rejected = pq.read_table(ingested.file("rejected.parquet")).to_pylist()
    assert [(row["path"], row["reason"]) for row in rejected] == [
        ("corpus/broken.md", "invalid UTF-8 at byte 0")
    ]
    assert len(list(iter_documents(ingested.folder("documents")))) == 48


def test_filter_lists_every_drop_with_its_reason(filtered: Artifact, ingested: Artifact):
    stats = filtered.json("stats.json")
    assert stats["dropped_by_reason"] == {"length.too_short": 1}
    assert stats["read"] == stats["kept"] + stats["dropped"] == 48
    (row,) = pq.read_table(filtered.file("dropped.parquet")).to_pylist()
    assert (row["path"], row["reason"]) == ("corpus/short.md", "length.too_short")


def test_filters_that_keep_nothing_name_the_worst(make: Builder, ingested: Artifact):
    with pytest.raises(
        HeadwaterError, match=r"kept none of 48 documents: 'gopher_quality' dropped 47 of them"
    ):
        make(filter.STAGE, {"documents": [ingested]}, text={"min_words": 10_000})


def test_a_corpus_already_filtered_passes_through(make: Builder, ingested: Artifact):
    kept = make(filter.STAGE, {"documents": [ingested]}, keep_everything=True)
    assert kept.metrics["documents"] == 48


def test_dedup_drops_copies_and_keeps_an_index(deduped: Artifact, filtered: Artifact):
    stats = deduped.json("stats.json")
    assert (stats["exact_duplicates"], stats["read"] - stats["kept"]) == (1, stats["dropped"])
    rows = pq.read_table(deduped.file("clusters.parquet")).to_pylist()
    assert sum(row["kept"] for row in rows) == len({row["cluster"] for row in rows}) >= 1
    ids = pq.read_table(deduped.file("index/ids.parquet")).column("id").to_pylist()
    assert ids == [d.id for d in iter_documents(deduped.folder("documents"))]


def test_dedup_against_chosen_older_documents(make: Builder, corpus: Path, deduped: Artifact, tmp_path: Path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old.md").write_text(prose(7), "utf-8")
    (tmp_path / "new" / "new.md").write_text(prose(500), "utf-8")
    (tmp_path / "new" / "new-copy.md").write_text(prose(500) + "\n", "utf-8")
    batch = make(ingest.STAGE, sources=str(tmp_path / "new"))
    alone = make(dedup.STAGE, {"documents": [batch]})
    against = make(dedup.STAGE, {"documents": [batch], "index": [deduped]})
    assert alone.metrics["documents"] == 2
    assert [d.path[:7] for d in iter_documents(against.folder("documents"))] == ["new/new"]
    with pytest.raises(HeadwaterError, match="set ngram to 5"):
        make(dedup.STAGE, {"documents": [batch], "index": [deduped]}, ngram=6)


def test_dedup_refuses_a_batch_without_anything_new(
    make: Builder, store: Store, deduped: Artifact, tmp_path: Path
):
    (tmp_path / "old.md").write_text(prose(7), "utf-8")
    batch = make(ingest.STAGE, sources=str(tmp_path))
    before = store.ids("dedup")
    with pytest.raises(HeadwaterError, match=r"all 1 documents of .* duplicates .*old\.md.*leave it out"):
        make(dedup.STAGE, {"documents": [batch], "index": [deduped]})
    assert store.ids("dedup") == before


def test_decontaminate_drops_a_planted_problem(make: Builder, problems: Artifact, tmp_path: Path):
    held = pq.read_table(problems.file("heldout.parquet")).to_pylist()[0]
    leak = " ".join(part for part in (held["prompt"], held["thought"], held["answer"]) if part)
    (tmp_path / "leaky").mkdir()
    (tmp_path / "leaky" / "bad.md").write_text(f"{prose(1)} {leak} {leak} {prose(2)}", "utf-8")
    (tmp_path / "leaky" / "good.md").write_text(prose(3), "utf-8")
    documents = make(ingest.STAGE, sources=str(tmp_path / "leaky"))
    inputs = {"documents": [documents], "evaluation": [problems]}
    cleaned = make(decontaminate.STAGE, inputs, ngram=6, min_words=3)
    assert [d.path for d in iter_documents(cleaned.folder("documents"))] == ["leaky/good.md"]
    (match,) = pq.read_table(cleaned.file("matches.parquet")).to_pylist()
    assert match["path"] == "leaky/bad.md"
    assert match["problem"] == held["id"]
    assert cleaned.metrics["contaminated"] == 1


def test_tokenizer_is_whole_and_measured(trained: Artifact):
    chat = ChatTokenizer(trained.file("tokenizer.json"))
    assert chat.vocab_size == trained.metrics["vocab_size"] == 400
    stats = trained.json("stats.json")
    assert stats["not_trained_on"]["texts"] >= 1
    assert trained.metrics["bytes_per_token"] > 1.2


def test_pack_gives_batches_and_a_bar_to_clear(packed: Artifact):
    stats = packed.json("stats.json")
    assert abs(stats["tokens"] - 12_000) < 500
    assert packed.metrics["bigram_bits_per_byte"] > packed.metrics["bigram_text_bits_per_byte"] * 0.9 > 0
    assert packed.metrics["heldout_bytes"] == stats["heldout"]["bytes"] > 0
    loader = ShardLoader(packed.folder("train"), batch_rows=4)
    assert loader.batch(3)["tokens"].shape == (4, 128)
    assert int(loader.batch(0)["tokens"].max()) < stats["vocab_size"]


STAGES = ["ingested", "filtered", "deduped", "cleaned", "trained", "packed"]


@pytest.mark.parametrize("name", STAGES)
def test_a_second_attempt_has_the_same_digest(name: str, make: Builder, request: pytest.FixtureRequest):
    first: Artifact = request.getfixturevalue(name)
    fixtures = {
        "ingested": lambda: (ingest.STAGE, {"sources": str(request.getfixturevalue("corpus"))}),
        "filtered": lambda: (filter.STAGE, {"inputs": {"documents": [request.getfixturevalue("ingested")]}}),
        "deduped": lambda: (dedup.STAGE, {"inputs": {"documents": [request.getfixturevalue("filtered")]}}),
        "cleaned": lambda: (
            decontaminate.STAGE,
            {
                "inputs": {
                    "documents": [request.getfixturevalue("deduped")],
                    "evaluation": [request.getfixturevalue("problems")],
                }
            },
        ),
        "trained": lambda: (
            tokenizer.STAGE,
            {
                "inputs": {
                    "documents": [request.getfixturevalue("cleaned")],
                    "problems": [request.getfixturevalue("problems")],
                },
                "vocab_size": 400,
                "sample_bytes": 20_000,
            },
        ),
        "packed": lambda: (pack.STAGE, request.getfixturevalue("packing")),
    }
    stage, arguments = fixtures[name]()
    again = make(stage, force=True, **arguments)
    assert again.id != first.id
    assert again.digest == first.digest


def test_a_changed_file_is_a_new_ingest(make: Builder, store: Store, tmp_path: Path):
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.md").write_text(prose(1), "utf-8")
    config = ingest.IngestConfig(sources=str(root))
    first = build(store, ingest.STAGE, config, {})
    assert build(store, ingest.STAGE, config, {}).status == "cached"
    (root / "a.md").write_text(prose(2), "utf-8")
    assert build(store, ingest.STAGE, config, {}).artifact.id != first.artifact.id


def test_too_many_broken_files_stop_the_ingest(make: Builder, store: Store, tmp_path: Path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    before = store.ids("ingest")
    with pytest.raises(HeadwaterError, match=r"error_budget is 5\.0%.*bad\.txt"):
        make(ingest.STAGE, sources=str(tmp_path))
    assert store.ids("ingest") == before


def test_builtin_sources_need_nothing(make: Builder):
    artifact = make(ingest.STAGE, sources="stdlib", max_bytes=300_000)
    stats = artifact.json("stats.json")
    assert set(stats["documents_by_source"]) == {"stdlib-code", "stdlib-docstrings"}
    assert 200_000 < stats["bytes"] <= 300_000
