import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dedup.clusters import Clusters
from data.dedup.deduplicate import Deduplicator, Found
from data.dedup.index import Settings, read_index, write_index
from data.dedup.minhash import MinHash
from data.dedup.shingles import WordHashes, exact_key, jaccard, shingles, split_words
from data.documents import Document, DocumentWriter, make_document
from infra.errors import HeadwaterError

SETTINGS = Settings()


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randint(0, 3000)}" for _ in range(count)]


def plain_shingles(text: str, n: int) -> set[tuple[str, ...]]:
    parts = split_words(text)
    n = min(n, len(parts))
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)} if parts else set()


def document(name: str, text: str) -> Document:
    return make_document("test", name, "", text)


def find(
    documents: list[Document], scratch: Path, old: tuple = (), settings: Settings = SETTINGS
) -> tuple[Found, set[str]]:
    finder = Deduplicator(settings, scratch)
    for index, folder in old:
        finder.add_index(index, folder)
    for one in documents:
        finder.add(one)
    found = finder.find()
    finder.close()
    assert not list(scratch.glob("*.bin"))
    paths = {one.id: one.path for one in documents}
    return found, {paths[v.id] for v in found.verdicts if v.kept}


@given(
    a=st.text(alphabet="ab \n,", max_size=60), b=st.text(alphabet="ab \n,", max_size=60), n=st.integers(1, 5)
)
def test_jaccard_of_hashed_shingles_is_that_of_the_shingles(a, b, n):
    table = WordHashes()
    one, other = plain_shingles(a, n), plain_shingles(b, n)
    either = len(one | other)
    expected = len(one & other) / either if either else 0.0
    assert jaccard(shingles(a, n, table), shingles(b, n, table)) == pytest.approx(expected)


def test_word_hashes_are_the_same_in_every_process():
    # A kept index would be worthless otherwise: these values may never change.
    assert shingles("a b c", 5, WordHashes()).tolist() == shingles("A, b; C!", 5, WordHashes()).tolist()
    assert shingles("a b c", 5, WordHashes()).tolist() == [15634932038899266560]
    assert WordHashes()["headwater"] == 0x68251AAF7CD8B277
    assert MinHash(2, 2).signature(np.arange(9, dtype=np.uint64)).tolist() == [
        520824175,
        685225717,
        488985246,
        66756824,
    ]


def test_signatures_estimate_similarity_without_bias():
    rng = np.random.default_rng(0)
    family = MinHash(64, 4)
    for overlap in (100, 500, 900):
        pool = rng.integers(0, 2**63, 2000 - overlap, dtype=np.uint64)
        a, b = np.sort(pool[:1000]), np.sort(pool[1000 - overlap :])
        true = overlap / (2000 - overlap)
        estimate = float((family.signature(a) == family.signature(b)).mean())
        assert abs(estimate - true) < 4 * np.sqrt(true * (1 - true) / 256)


def test_band_collisions_follow_the_formula():
    rng = np.random.default_rng(1)
    family = MinHash(14, 8)
    hits, rounds, overlap = 0, 200, 860
    for _ in range(rounds):
        pool = rng.integers(0, 2**63, 2000 - overlap, dtype=np.uint64)
        keys = family.band_keys(
            np.stack([family.signature(pool[:1000]), family.signature(pool[1000 - overlap :])])
        )
        hits += bool((keys[0] == keys[1]).any())
    similarity = overlap / (2000 - overlap)
    expected = 1 - (1 - similarity**8) ** 14
    assert 0.6 < expected < 0.9
    assert abs(hits / rounds - expected) < 4 * np.sqrt(expected * (1 - expected) / rounds)


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path: Path):
    rng = random.Random(3)
    documents, planted, near_misses = [], set(), set()
    for i in range(150):
        text = words(rng, 300)
        documents.append(document(f"{i:03d}", " ".join(text)))
        if i < 60:  # a copy with 3 words changed in different places: similarity about 0.9
            copy = list(text)
            for place in (50, 150, 250):
                copy[place] = "x"  # shorter, so that the original is kept
            documents.append(document(f"{i:03d}-copy", " ".join(copy[:-1])))
            planted.add(f"{i:03d}-copy")
        elif i < 100:  # a third of the text is other words: similarity about 0.5
            documents.append(document(f"{i:03d}-miss", " ".join(text[:200] + words(rng, 100))))
            near_misses.add(f"{i:03d}-miss")
    found, kept = find(documents, tmp_path)
    dropped = {d.path for d in documents} - kept
    assert len(dropped & planted) >= 0.98 * len(planted)
    assert not dropped - planted
    assert near_misses <= kept
    for verdict in found.verdicts:
        if not verdict.kept:
            assert verdict.jaccard >= 0.8
            assert not verdict.exact
    assert found.duplicates == len(dropped)


def test_the_result_does_not_depend_on_the_order(tmp_path: Path):
    rng = random.Random(4)
    base = [words(rng, 200) for _ in range(20)]
    documents = [
        document(f"{i}-{k}", " ".join(text[: 200 - 4 * k])) for i, text in enumerate(base) for k in range(4)
    ]
    _, kept = find(documents, tmp_path)
    assert kept == {f"{i}-0" for i in range(20)}  # the longest of each
    rng.shuffle(documents)
    assert find(documents, tmp_path)[1] == kept


def test_exact_copies_differ_in_white_space_only(tmp_path: Path):
    texts = {
        "a": "one two\nthree",
        "b": "one  two three ",
        "c": "one two Three",
        "d": "!!!",
        "e": "!!!",
        "f": "???",
    }
    found, kept = find([document(name, text) for name, text in texts.items()], tmp_path)
    by_path = dict(zip(texts, found.verdicts, strict=True))
    assert by_path["a"].kept != by_path["b"].kept
    assert (by_path["a"].exact, by_path["b"].exact) in ((True, False), (False, True))
    assert kept >= {"f"}
    assert by_path["d"].kept != by_path["e"].kept  # no words, but the same signs
    assert exact_key("e\u0301") == exact_key("\u00e9")


def test_new_documents_are_compared_with_chosen_old_ones_and_each_other(tmp_path: Path):
    rng = random.Random(5)
    old_texts = [words(rng, 200) for _ in range(6)]
    old = [document(f"old{i}", " ".join(text)) for i, text in enumerate(old_texts)]
    first, kept = find(old, tmp_path)
    assert len(kept) == 6
    with DocumentWriter(tmp_path / "old" / "documents") as writer:
        for one in old:
            writer.add(one)
    write_index(tmp_path / "old" / "index", first.index, SETTINGS)
    index = read_index(tmp_path / "old" / "index", SETTINGS)

    fresh = words(rng, 200)
    batch = [
        document("exact", " ".join(old_texts[0]) + "\n"),
        document("near", " ".join([*old_texts[1][:-2], "other"])),
        document("longer", " ".join([*old_texts[2], "and", "more"])),  # longer, and still the old one stays
        document("fresh", " ".join(fresh)),
        document("fresh-copy", " ".join(fresh[:-3])),
        document("half", " ".join(old_texts[3][:100] + words(rng, 100))),
    ]
    found, kept = find(batch, tmp_path, ((index, tmp_path / "old" / "documents"),))
    assert kept == {"fresh", "half"}
    verdicts = {one.path: v for one, v in zip(batch, found.verdicts, strict=True)}
    assert [verdicts[n].representative for n in ("exact", "near", "longer")] == [old[i].id for i in range(3)]
    assert all(verdicts[n].from_index for n in ("exact", "near", "longer"))
    assert verdicts["exact"].exact
    assert 0.8 <= verdicts["near"].jaccard < 1.0
    assert not verdicts["fresh-copy"].from_index
    assert found.index.ids == [batch[3].id, batch[5].id]  # the index of this batch holds this batch
    # A second day: both indexes at once, and a document that is near one of each.
    with DocumentWriter(tmp_path / "day2" / "documents") as writer:
        writer.add(batch[3])
        writer.add(batch[5])
    again, kept = find(
        [document("again", " ".join(fresh)), document("old5", " ".join(old_texts[5]))],
        tmp_path,
        ((index, tmp_path / "old" / "documents"), (found.index, tmp_path / "day2" / "documents")),
    )
    assert not kept
    assert [v.representative for v in again.verdicts] == [batch[3].id, old[5].id]
    assert len(again.index.ids) == 0


def test_an_index_of_other_settings_or_damaged_is_refused(tmp_path: Path):
    found, _ = find([document("a", "one two three four five six")], tmp_path)
    write_index(tmp_path / "index", found.index, SETTINGS)
    with pytest.raises(HeadwaterError, match="ngram = 5, this run uses 7"):
        read_index(tmp_path / "index", Settings(ngram=7))
    (tmp_path / "index" / "signatures.safetensors").write_bytes(b"torn")
    with pytest.raises(HeadwaterError, match="not a readable dedup index"):
        read_index(tmp_path / "index", SETTINGS)


def test_crowded_bands_stay_affordable(tmp_path: Path):
    # Every document shares a head: with one row a band nearly all meet, and few are alike.
    rng = random.Random(6)
    head = words(rng, 60)
    documents = [document(str(i), " ".join(head + words(rng, 60))) for i in range(300)]
    found, kept = find(documents, tmp_path, settings=Settings(bands=8, rows=1))
    assert len(kept) == 300
    assert found.candidates < 300 * 8 * 32  # not all 44,850 pairs in each band


def test_empty_batches_and_union_find(tmp_path: Path):
    found, kept = find([], tmp_path)
    assert not kept
    assert not found.verdicts
    clusters = Clusters(6)
    for a, b in ((4, 5), (1, 2), (2, 4)):
        clusters.join(a, b)
    assert clusters.roots().tolist() == [0, 1, 1, 3, 1, 1]
