from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.assemble import Plan, assemble
from data.chat import BOS, EOS, FIM_BEGIN, PAD, SPECIALS, ChatTokenizer
from data.documents import DocumentWriter, iter_documents, make_document
from data.encode import Problem, ProblemEncoder, TextEncoder, heldout_pieces
from data.heldout import divide
from data.sample import problem_sample, text_sample
from data.shards import ShardReader
from infra.errors import ConfigError, HeadwaterError
from infra.files import write_parquet
from tests.data.spans import restore

PLAN = Plan(
    sequence_length=64,
    token_budget=12_000,
    mixture={"text": 1.0, "sum": 2.0, "sort": 1.0},
    heldout_share=0.1,
    heldout_tokens=0,
    fim_rate=0.3,
    split_rate=0.0,
    direct_share=0.0,
    prompt_loss=True,
    mix_below=0.5,
    seed=0,
)


def text(i: int) -> str:
    """A document that names itself in every line; every third is longer than a row."""
    return "".join(f"document{i} says {k * 7 + i}, and goes on.\n" for k in range(2 + 9 * (i % 3 == 0)))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    with DocumentWriter(tmp_path / "documents", bytes_per_file=4000) as writer:
        for i in range(60):
            writer.add(make_document("folder", f"d/{i}.md", "", text(i)))
    return tmp_path / "documents"


@pytest.fixture
def problems(tmp_path: Path) -> list[Path]:
    rows = [
        {
            "id": f"{family}{i}",
            "family": family,
            "prompt": f"{family} of {i} and {i * 3}?",
            "thought": f"so {i}",
            "answer": f"{i * 4}",
            "expected": "",
            "system": "think" if i % 2 else "",
        }
        for family in ("sum", "sort")
        for i in range(120)
    ]
    rows += [{**rows[0], "id": "long", "thought": "word " * 200}]
    write_parquet(tmp_path / "train.parquet", pa.Table.from_pylist(rows))
    return [tmp_path / "train.parquet"]


def run(documents: Path, problems: list[Path], chat: ChatTokenizer, out: Path, **changes) -> dict:
    plan = Plan(**{**vars(PLAN), **changes})
    stats = assemble(documents, problems, chat, plan, out, out / "scratch")
    assert not list((out / "scratch").iterdir())
    return stats


def segments(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, loss) of every piece of every row."""
    reader = ShardReader(folder)
    rows = reader.read(range(reader.rows))
    found = []
    for ids, segment, loss in zip(rows.tokens, rows.segments, rows.loss, strict=True):
        assert np.all(ids[segment < 0] == PAD)
        found += [(ids[segment == s], loss[segment == s]) for s in range(segment.max() + 1)]
    return found


def test_shards_hold_the_mixture_that_was_asked_for(documents, problems, chat, tmp_path):
    stats = run(documents, problems, chat, tmp_path / "out")
    found = segments(tmp_path / "out" / "train")
    assert stats["tokens"] == sum(len(ids) for ids, _ in found)
    assert abs(stats["tokens"] - 12_000) < 3 * 64
    for name, share in (("text", 0.25), ("sum", 0.5), ("sort", 0.25)):
        assert abs(stats["sources"][name]["share"] - share) < 0.01
    assert stats["sources"]["sum"]["epochs"] > 1
    assert stats["sources"]["sum"]["too_long"] == 1
    assert stats["fill"] > 0.8  # pieces of 40 to 64 in rows of 64
    assert stats["rows"] == ShardReader(tmp_path / "out" / "train").rows
    written = [chat.decode(ids, keep_specials=True) for ids, _ in found]
    in_sum = sum(len(ids) for (ids, _), said in zip(found, written, strict=True) if "sum of" in said)
    assert in_sum == stats["sources"]["sum"]["tokens"]
    assert "word word" not in "".join(written)


def test_rows_mix_lengths_and_kinds_unless_told_otherwise(documents, problems, chat, tmp_path):
    def mixed(out: Path, **changes) -> float:
        run(documents, problems, chat, out, sequence_length=256, token_budget=40_000, fim_rate=0.0, **changes)
        reader = ShardReader(out / "train")
        rows = reader.read(range(reader.rows)).segments
        lengths = [np.bincount(row[row >= 0]) for row in rows]
        return float(np.mean([len(set(few.tolist())) > 2 for few in lengths if len(few) > 2]))

    assert mixed(tmp_path / "mixed") > 0.9
    assert mixed(tmp_path / "sorted", mix_below=0.0) < 0.3


def test_problems_stand_in_the_chat_layout(documents, problems, chat, tmp_path):
    run(documents, problems, chat, tmp_path / "out")
    found = {tuple(ids.tolist()) for ids, _ in segments(tmp_path / "out" / "train")}
    for i in range(8):
        system = "think" if i % 2 else ""
        ids = chat.prompt_ids(f"sum of {i} and {i * 3}?", system) + chat.response_ids(f"so {i}", f"{i * 4}")
        assert tuple(ids) in found


def test_whole_fim_spans_and_cut_documents(documents, problems, chat, tmp_path):
    stats = run(documents, problems, chat, tmp_path / "out", mixture={"text": 1.0}, token_budget=6000)
    found = [ids for ids, _ in segments(tmp_path / "out" / "train")]
    spans = [ids for ids in found if FIM_BEGIN in ids]
    assert stats["sources"]["text"]["rewritten_for_fim"] > 3
    assert len(spans) >= stats["sources"]["text"]["rewritten_for_fim"] - 1
    for ids in spans:
        assert "document" in chat.decode(restore(ids))  # raises unless it is whole
    assert stats["sources"]["text"]["longer_than_a_row"] > 5
    whole = [ids for ids in found if FIM_BEGIN not in ids and len(ids) < 64]
    cut = [ids for ids in whole if not (ids[0] == BOS and ids[-1] == EOS)]
    assert all(ids[-1] == EOS for ids in cut)  # the tail of a longer document, nothing that fits is cut


def test_held_out_text_never_enters_training(documents, problems, chat, tmp_path):
    stats = run(documents, problems, chat, tmp_path / "out", token_budget=200_000, fim_rate=0.0)
    listed = divide(documents, 0.1)
    by_id = {d.id: d.text for d in iter_documents(documents)}
    held = [by_id[name] for name in listed.heldout]
    assert 2 <= len(held) < 15
    seen = "".join(chat.decode(ids) for ids, _ in segments(tmp_path / "out" / "train"))
    assert all(f"{t.split()[0]} says" not in seen for t in held)
    assert all(f"{by_id[name].split()[0]} says" in seen for name in listed.train)
    assert stats["heldout"]["bytes"] == sum(len(t.encode()) for t in held)
    found = segments(tmp_path / "out" / "heldout")
    targets = sum(int(loss.sum()) for _, loss in found)
    assert targets == sum(len(chat.encode(t)) + 1 for t in held) == stats["heldout"]["targets"]
    assert all(loss[0] == 0 and loss[1:].all() for _, loss in found)  # each target has a token before it
    spelled = sorted(chat.decode(ids[loss == 1]) for ids, loss in found)
    assert sum(map(len, spelled)) == sum(map(len, held))
    assert 0 < stats["bigram"]["bits_per_byte"] < 8
    assert stats["bigram"]["text_bits_per_byte"] < stats["bigram"]["bits_per_byte"]


def test_a_bound_on_held_out_tokens_keeps_bytes_exact(documents, problems, chat, tmp_path):
    stats = run(documents, problems, chat, tmp_path / "out", heldout_tokens=100, heldout_share=0.3)
    found = segments(tmp_path / "out" / "heldout")
    assert 50 <= stats["heldout"]["tokens"] <= 150
    assert stats["heldout"]["bytes"] == sum(len(chat.decode(ids[loss == 1]).encode()) for ids, loss in found)


def test_modules_are_held_out_with_their_docstrings(tmp_path):
    with DocumentWriter(tmp_path / "documents") as writer:
        for i in range(80):
            writer.add(make_document("stdlib-code", f"python/{i}.py", "", f"x = {i}"))
            writer.add(make_document("stdlib-docstrings", f"python/{i}.py#docstrings", "", f"about {i}"))
    listed = divide(tmp_path / "documents", 0.2)
    paths = {d.id: d.path for d in iter_documents(tmp_path / "documents")}
    held = {paths[name].partition("#")[0] for name in listed.heldout}
    assert 5 < len(held) < 30
    assert len(listed.heldout) == 2 * len(held)
    assert held.isdisjoint(paths[name].partition("#")[0] for name in listed.train)
    smallest = divide(tmp_path / "documents", 1e-9)
    assert len(smallest.heldout) == 2
    assert set(smallest.heldout) <= set(listed.heldout)


def test_the_same_plan_gives_the_same_bytes(documents, problems, chat, tmp_path):
    assert run(documents, problems, chat, tmp_path / "a") == run(documents, problems, chat, tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) >= 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "d" / "scratch").mkdir(parents=True)
    (tmp_path / "d" / "scratch" / "train.ids.bin").write_bytes(b"left by a killed try" * 99)
    run(documents, problems, chat, tmp_path / "d")
    assert (tmp_path / "d" / files[0]).read_bytes() == (tmp_path / "a" / files[0]).read_bytes()
    run(documents, problems, chat, tmp_path / "c", seed=1)
    assert (tmp_path / "a" / files[-1]).read_bytes() != (tmp_path / "c" / files[-1]).read_bytes()


def test_far_targets_encode_further_than_first_guessed(documents, problems, chat, tmp_path):
    # 6 bytes a token is far more than these documents have, and still only what is needed is encoded.
    few = run(documents, problems, chat, tmp_path / "a", mixture={"text": 1.0}, token_budget=300)
    assert few["sources"]["text"]["encoded"] < 40
    # Long runs of one letter: hundreds of bytes a token would need many rounds of encoding.
    with DocumentWriter(tmp_path / "many") as writer:
        for i in range(40):
            writer.add(make_document("folder", f"{i}.md", "", "=" * 2000 + str(i)))
    many = run(tmp_path / "many", problems, chat, tmp_path / "b", mixture={"text": 1.0}, token_budget=3000)
    assert abs(many["tokens"] - 3000) < 64


def test_errors_say_what_to_change(documents, problems, chat, tmp_path):
    with pytest.raises(
        HeadwaterError, match=r"all 120 problems of 'sort' are longer than sequence_length = 32"
    ):
        run(documents, _longer(problems, tmp_path), chat, tmp_path / "a", sequence_length=32)
    with pytest.raises(ConfigError, match=r"no 'sums' among the inputs; did you mean sum"):
        run(documents, problems, chat, tmp_path / "b", mixture={"sums": 1.0})
    with DocumentWriter(tmp_path / "one") as writer:
        writer.add(make_document("folder", "a.md", "", "alone"))
    with pytest.raises(HeadwaterError, match="documents of 1 file: at least two"):
        run(tmp_path / "one", problems, chat, tmp_path / "c")
    write_parquet(tmp_path / "wrong.parquet", pa.table({"id": ["x"]}))
    with pytest.raises(HeadwaterError, match=r"wrong\.parquet is not a file of problems"):
        run(documents, [tmp_path / "wrong.parquet"], chat, tmp_path / "d")


def _longer(problems: list[Path], tmp_path: Path) -> list[Path]:
    import pyarrow.parquet as pq

    rows = [{**row, "thought": "word " * 40} for row in pq.read_table(problems[0]).to_pylist()]
    write_parquet(tmp_path / "longer.parquet", pa.Table.from_pylist(rows))
    return [tmp_path / "longer.parquet"]


def test_problem_forms(chat):
    problems = [Problem(f"p{i}", "f", "why?", "hmm", "so", "sys") for i in range(400)]
    encoded = ProblemEncoder(chat, direct_share=0.25, prompt_loss=False, seed=0).encode(problems)
    direct = chat.prompt_ids("why?", "sys") + chat.response_ids("", "so")
    reasoned = chat.prompt_ids("why?", "sys") + chat.response_ids("hmm", "so")
    kinds = [piece.ids.tolist() for piece in encoded]
    assert kinds.count(direct) + kinds.count(reasoned) == 400
    assert 70 < kinds.count(direct) < 130
    prompt = len(chat.prompt_ids("why?", "sys"))
    assert all(piece.loss[:prompt].sum() == 0 and piece.loss[prompt:].all() for piece in encoded)
    (whole,) = ProblemEncoder(chat, 0.0, True, 0).encode(problems[:1])
    assert whole.loss.tolist() == [0] + [1] * (len(whole.ids) - 1)


def test_text_pieces_join_to_the_document(chat):
    long = "".join(f"line {i}\n" for i in range(200))
    encoder = TextEncoder(chat, 64, fim_rate=0.0, split_rate=0.5, seed=0)
    short_pieces, long_pieces = encoder.encode([("a", "short"), ("b", long)])
    assert len(short_pieces) == 1
    ids = np.concatenate([p.ids for p in long_pieces])
    assert chat.decode(ids) == long
    assert all(len(p.ids) == 64 for p in long_pieces[:-1])
    assert [int(i) for i in ids if i < len(SPECIALS)] == [BOS, EOS]
    parts = heldout_pieces(chat, [long, ""], 64)
    assert chat.decode(np.concatenate([p.ids[p.loss == 1] for p in parts[0]])) == long
    assert all(p.ids[0] == q.ids[-1] for q, p in zip(parts[0], parts[0][1:], strict=False))
    assert [p.ids.tolist() for p in parts[1]] == [[BOS, EOS]]


def test_samples_for_the_tokenizer(documents, problems):
    total = sum(len(d.text) for d in iter_documents(documents))
    sample, rest = text_sample(documents, 3000, seed=0)
    assert 2000 < sum(map(len, sample)) <= 3000
    assert rest
    assert set(sample).isdisjoint(rest)
    everything, rest = text_sample(documents, 10**9, seed=0)
    assert 0.9 * total < sum(map(len, everything)) < total
    assert rest
    assert text_sample(documents, 3000, seed=0)[0] == sample
    assert text_sample(documents, 3000, seed=1)[0] != sample
    few = problem_sample(problems, 400, seed=0)
    assert 400 <= sum(map(len, few)) < 600
    assert {part.split()[0] for part in few} >= {"sum", "sort"}
    assert problem_sample(problems, 0, seed=0) == []
