"""From tokens to text as they come, and from conversations to tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import ASSISTANT, BOS, END_THINK, EOS, SPECIALS, THINK, USER, ChatTokenizer
from flows.serving.conversation import Message, conversation_ids, fit
from flows.serving.detokenize import Answer, Piece, TextStream
from model.engine.request import Update
from tests.post_training.small import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


IDS = st.lists(st.one_of(st.integers(10, 319), st.integers(0, 400), st.sampled_from([THINK, END_THINK])))
# Texts whose characters have one to four bytes, so that tokens cut them.
TEXT = st.text(alphabet=st.sampled_from("abn \n<é｜日𝒳"), max_size=30)


def run(stream: TextStream, ids: list[int], size: int) -> list[list[Piece]]:
    """What each feed of `size` tokens shows, and then the end."""
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [*(stream.feed(part, [-float(i) for i in part]) for part in parts), stream.close()]


def texts(shown: list[list[Piece]]) -> tuple[str, str]:
    """The thought and the answer."""
    flat = [piece for pieces in shown for piece in pieces]
    return (
        "".join(piece.text for piece in flat if piece.thought),
        "".join(piece.text for piece in flat if not piece.thought),
    )


@settings(max_examples=200, deadline=None)
@given(ids=IDS, size=st.integers(1, 5), begun=st.booleans())
def test_what_is_shown_is_what_decoding_the_whole_gives(
    tokenizer: ChatTokenizer, ids: list[int], size: int, begun: bool
) -> None:
    ids = [THINK, *ids] if begun else ids
    table = tokenizer.token_bytes()
    thought, answer = texts(run(TextStream(table), ids, size))
    known = [i for i in ids if i < len(table)]
    apart = ids[:1] == [THINK]
    end = known.index(END_THINK) if apart and END_THINK in known else len(known)
    assert thought == (tokenizer.decode(known[:end]) if apart else "")
    assert answer == tokenizer.decode(known[end:] if apart else known)
    assert texts(run(TextStream(table, thoughts=False), ids, size)) == ("", tokenizer.decode(known))


@settings(max_examples=300, deadline=None)
@given(before=TEXT, after=TEXT, stops=st.lists(TEXT.filter(bool), max_size=3), size=st.integers(1, 4))
def test_a_stop_string_is_never_shown_nor_any_part_of_it(
    tokenizer: ChatTokenizer, before: str, after: str, stops: list[str], size: int
) -> None:
    ids = tokenizer.encode(before) + tokenizer.encode(after)
    table = tokenizer.token_bytes()
    stream = TextStream(table, stops)
    shown = run(stream, ids, size)
    _, text = texts(shown)
    whole = before + after
    assert whole.startswith(text)
    assert stream.stopped == any(stop in whole for stop in stops)
    assert not any(stop in text for stop in stops)
    if stream.stopped:
        assert any(whole[len(text) :].startswith(stop) for stop in stops)
    else:
        assert text == whole
    # What was shown at any time is a beginning of what is shown in the end, however it was cut up.
    assert texts(run(TextStream(table, stops), ids, 1)) == ("", text)


def test_half_a_character_and_half_a_stop_string_wait(tokenizer: ChatTokenizer) -> None:
    table = tokenizer.token_bytes()
    euro = [table.index(bytes([byte])) for byte in "€".encode()]
    stream = TextStream(table, ["ab"])
    assert stream.feed(euro[:2], [0.0, 0.0])[0].text == ""
    assert [piece.text for piece in stream.feed(euro[2:], [0.0])] == ["€"]
    a, b = (table.index(letter) for letter in (b"a", b"b"))
    assert stream.feed([a], [0.0]) == []
    assert [piece.text for piece in stream.feed([a], [0.0])] == ["a"]
    assert stream.feed([b], [0.0]) == []
    assert stream.stopped
    assert stream.close() == []


def test_scores_come_with_their_text_and_stop_with_it(tokenizer: ChatTokenizer) -> None:
    table = tokenizer.token_bytes()
    ids = [THINK, *tokenizer.encode("so 12"), END_THINK, *tokenizer.encode("answer 21 and more"), EOS]
    shown = [piece for pieces in run(TextStream(table, ["and"]), ids, 2) for piece in pieces]
    for thought, text in ((True, "so 12"), (False, "answer 21 ")):
        scored = [one for piece in shown if piece.thought is thought for one in piece.scored]
        assert "".join(table[one.token].decode() for one in scored).startswith(text)
        assert [one.offset for one in scored] == [
            len("".join(table[one.token].decode() for one in scored[:i])) for i in range(len(scored))
        ]
        assert [one.log_prob for one in scored] == [-float(one.token) for one in scored]
    assert texts([shown]) == ("so 12", "answer 21 ")


def test_an_answer_ends_at_its_stop_string_whatever_comes_after(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("one two")
    answer = Answer(tokenizer.token_bytes(), ["two"])
    pieces = answer.take(Update(0, tuple(ids), tuple(0.0 for _ in ids)))
    assert (texts([pieces])[1], answer.finish, answer.made) == ("one ", "stop", len(ids))
    assert answer.take(Update(0, (20,), (0.0,), "length")) == []
    assert answer.finish == "stop"


def test_layout_of_several_turns(tokenizer: ChatTokenizer) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "2+2?"),
        Message("assistant", "4"),
        Message("system", "Be kind."),
        Message("user", f"and 3+3?{SPECIALS[ASSISTANT]}"),
    ]
    ids = conversation_ids(tokenizer, messages)
    assert tokenizer.decode(ids, keep_specials=True) == (
        f"{SPECIALS[BOS]}Be brief.\n\nBe kind.{SPECIALS[USER]}2+2?{SPECIALS[ASSISTANT]}4{SPECIALS[EOS]}"
        f"{SPECIALS[USER]}and 3+3?{SPECIALS[ASSISTANT]}{SPECIALS[ASSISTANT]}"
    )
    assert [i for i in ids if i < len(SPECIALS)] == [BOS, USER, ASSISTANT, EOS, USER, ASSISTANT]
    one = conversation_ids(tokenizer, [Message("system", "Be brief."), Message("user", "2+2?")])
    assert one == tokenizer.prompt_ids("2+2?", "Be brief.")


def test_the_oldest_turns_go_first_and_the_system_prompt_stays(tokenizer: ChatTokenizer) -> None:
    turns = [Message(role, f"{role} {i} says something") for i in range(4) for role in ("user", "assistant")]
    messages = [Message("system", "Be brief."), *turns, Message("user", "last")]
    whole = conversation_ids(tokenizer, messages)
    assert fit(tokenizer, messages, len(whole)) == (whole, messages, 0)
    ids, kept, lost = fit(tokenizer, messages, len(whole) - 1)
    assert (kept, lost) == ([messages[0], *messages[3:]], 1)
    assert ids == conversation_ids(tokenizer, kept)
    assert fit(tokenizer, messages, 1)[1:] == ([messages[0], messages[-1]], 4)


def test_a_padded_vocabulary_has_ids_without_text(tokenizer: ChatTokenizer) -> None:
    table = tokenizer.token_bytes()
    assert texts(run(TextStream(table), [len(table) + 5, 40], 1))[1] == tokenizer.decode([40])
