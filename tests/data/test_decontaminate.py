import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.decontaminate import Contamination, evaluation_texts
from data.dedup.shingles import split_words
from data.documents import DocumentWriter, make_document
from infra.errors import HeadwaterError

QUESTION = "A farmer has 17 sheep, sells 5 of them, and then buys 12 more. How many sheep are there now?"
SHORT = "Sort 9 4 7 1 in order"


def test_a_planted_run_is_found_whatever_its_signs_and_case():
    found = Contamination([("p1", QUESTION), ("p2", "something else entirely " * 5)]).find(
        "Page 3.\nsells 5 of them — and THEN\nbuys 12 more; how many? The end."
    )
    assert found is not None
    assert found.problem == "p1"
    assert found.ngram == "sells 5 of them and then buys 12 more how"


def test_nine_shared_words_are_not_ten():
    run = "sells 5 of them and then buys 12 more"
    assert len(run.split()) == 9
    assert Contamination([("p1", QUESTION)]).find(f"they say {run} and then nothing") is None
    assert Contamination([("p1", QUESTION)], ngram=9).find(f"they say {run} and then nothing") is not None


def test_short_questions_are_looked_for_whole():
    contamination = Contamination([("s", SHORT), ("t", "2 + 2")], min_words=6)
    assert contamination.texts == 1  # "2 + 2" says nothing: any page of numbers has it
    assert contamination.find("Please SORT: 9, 4, 7, 1 in order!").problem == "s"
    assert contamination.find("sort 9 4 7 1 in disorder") is None
    assert contamination.find("2 + 2 = 4") is None
    assert Contamination([("s", SHORT)], min_words=8).texts == 0


def test_nothing_to_look_for_finds_nothing():
    assert Contamination([]).find("any text at all") is None
    assert Contamination([("p1", QUESTION)]).find("") is None


@given(data=st.data())
def test_equals_a_search_through_all_runs(data):
    letters = st.lists(st.sampled_from("abc"), max_size=25).map(" ".join)
    texts = [(f"p{i}", text) for i, text in enumerate(data.draw(st.lists(letters, max_size=4)))]
    document = data.draw(letters)
    ngram, least = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 6))
    words = split_words(document)
    expected = False
    for _, text in texts:
        parts = split_words(text)
        n = min(ngram, len(parts))
        if n >= min(least, ngram) and n:
            runs = {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}
            expected |= any(tuple(words[i : i + n]) in runs for i in range(len(words) - n + 1))
    assert (Contamination(texts, ngram, least).find(document) is not None) == expected


def test_planted_contamination_in_long_documents():
    rng = random.Random(0)
    word = lambda: f"w{rng.randint(0, 200)}"  # noqa: E731
    questions = [(f"q{i}", " ".join(word() for _ in range(30))) for i in range(100)]
    contamination = Contamination(questions)
    for i in range(50):
        text = [word() for _ in range(2000)]
        assert contamination.find(" ".join(text)) is None
        place = rng.randint(0, 1990)
        start = rng.randint(0, 20)
        text[place:place] = questions[i][1].split()[start : start + 10]
        assert contamination.find(" ".join(text)).problem == f"q{i}"


def test_evaluation_texts_of_problems_and_documents(tmp_path: Path):
    row = {"id": "x", "family": "f", "prompt": "Why?", "thought": "Since", "answer": "so", "expected": "so"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "heldout.parquet")
    assert list(evaluation_texts(tmp_path / "heldout.parquet")) == [("x", "Why?"), ("x", "Since so")]
    with DocumentWriter(tmp_path / "documents") as writer:
        writer.add(make_document("s", "p", "", "an exam"))
    assert [text for _, text in evaluation_texts(tmp_path / "documents")] == ["an exam"]
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(HeadwaterError, match=r"other\.parquet is not a file of problems"):
        list(evaluation_texts(tmp_path / "other.parquet"))
