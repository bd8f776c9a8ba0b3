"""From documents, problems and a tokenizer to token shards: the pack stage, step by step.

1. Held-out documents are set apart before anything else.
2. The mixture says how many tokens each source gives; documents are drawn, epoch by epoch, and encoded.
3. Their pieces are packed into rows, in a shuffled order, and written.
4. A bigram model of the training rows is scored on the held-out rows.

In memory: some 100 bytes for each document and piece, one batch of texts, one shard of rows, and for the
bigram model 16 bytes for each training token up to BIGRAM_TOKENS. Token ids wait in scratch files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import ChatTokenizer
from data.encode import ProblemEncoder, TextEncoder, heldout_pieces
from data.gather import TEXT, Group, Pieces, gather_problems, gather_text, read_problems
from data.hashing import generator
from data.heldout import TextList, divide, texts_of
from data.mixture import nearest, shares
from data.ngram import BigramModel, Score
from data.packing import Rows, fill_rows, pack
from data.shards import ShardReader, ShardWriter

BIGRAM_TOKENS = 1 << 24
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Plan:
    """What to assemble."""

    sequence_length: int
    token_budget: int
    mixture: Mapping[str, float]  # weights, by family of problems; "text" for the documents
    heldout_share: float
    heldout_tokens: int  # at most about so many tokens are held out, 0 = no bound
    fim_rate: float
    split_rate: float
    direct_share: float
    prompt_loss: bool
    mix_below: float  # pieces shorter than this share of a row are packed in random order
    seed: int


@dataclass(frozen=True)
class Bigram:
    """The reference that a network has to beat on the held-out text."""

    nats_per_token: float
    bits_per_byte: float  # trained on all training rows, as the network is
    text_bits_per_byte: float  # trained on the text among them only, which suits held-out text better


def assemble(
    documents: Path,
    problems: Sequence[Path],
    tokenizer: ChatTokenizer,
    plan: Plan,
    out: Path,
    scratch: Path,
    log: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write `out/train` and `out/heldout` and return the statistics."""
    families = read_problems(problems)
    targets = shares(plan.mixture, [TEXT, *families], plan.token_budget)
    if unused := sorted({TEXT, *families} - set(targets)):
        log(f"without a weight in the mixture, and so left out: {', '.join(unused)}")
    listed = divide(documents, plan.heldout_share)
    pieces = Pieces(scratch, "train")
    try:
        groups: dict[str, Group] = {}
        for name, target in targets.items():
            if name == TEXT:
                encoder = TextEncoder(
                    tokenizer, plan.sequence_length, plan.fim_rate, plan.split_rate, plan.seed
                )
                groups[name] = gather_text(documents, listed, target, plan.seed, encoder, pieces, progress)
            else:
                problem_encoder = ProblemEncoder(tokenizer, plan.direct_share, plan.prompt_loss, plan.seed)
                groups[name] = gather_problems(
                    name, families[name], target, plan.seed, plan.sequence_length, problem_encoder, pieces
                )
            drawn = groups[name].draw
            epochs = f"{drawn.epochs:.2f} times through {drawn.available:,} documents"
            log(f"{name}: {groups[name].tokens:,} tokens, {epochs}")
        train = _write_rows(pieces, _shuffled(groups, plan.seed), plan, out / "train")
        text_rows = _as_one_row(pieces, groups[TEXT].numbers) if TEXT in groups else None
    finally:
        pieces.close()
    heldout = _write_heldout(documents, listed, tokenizer, plan, out / "heldout", scratch)
    bigram = _reference(out, tokenizer.vocab_size, text_rows, heldout["bytes"], heldout["targets"])
    return {
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": plan.sequence_length,
        **train,
        "sources": {name: _describe(group, train["tokens"]) for name, group in groups.items()},
        "heldout": heldout,
        "bigram": asdict(bigram),
    }


def _describe(group: Group, total: int) -> dict[str, Any]:
    return {
        "tokens": group.tokens,
        "share": group.tokens / max(1, total),
        "documents": len(group.draw.documents),
        "available": group.draw.available,
        "epochs": group.draw.epochs,
        **group.notes,
    }


def _shuffled(groups: Mapping[str, Group], seed: int) -> np.ndarray:
    """The numbers of all drawn pieces in a random order, so that packing mixes the sources."""
    numbers = np.concatenate([groups[name].numbers for name in sorted(groups)])
    return generator("pack-order", seed).permutation(numbers)


def _write_rows(pieces: Pieces, numbers: np.ndarray, plan: Plan, folder: Path) -> dict[str, Any]:
    lengths = pieces.lengths()[numbers]
    rows = pack(lengths, plan.sequence_length, int(plan.mix_below * plan.sequence_length))
    writer = ShardWriter(folder, plan.sequence_length)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        writer.add(fill_rows(some, lambda index: pieces[int(numbers[index])], plan.sequence_length))
    writer.close()
    tokens = int(lengths.sum())
    return {
        "rows": len(rows),
        "tokens": tokens,
        "pieces": len(numbers),
        "fill": tokens / max(1, len(rows) * plan.sequence_length),
    }


def _write_heldout(
    documents: Path, listed: TextList, tokenizer: ChatTokenizer, plan: Plan, folder: Path, scratch: Path
) -> dict[str, int]:
    """Held-out documents in the order of their hash, never rewritten or split, up to `heldout_tokens`.

    The last one may be there in part. `bytes` are those that the targets spell, so that losses in bits a byte
    are exact; the end of a document is a target that spells nothing.
    """
    pieces = Pieces(scratch, "heldout")
    wanted = {name: place for place, name in enumerate(listed.heldout)}
    found: dict[int, range] = {}
    try:
        for batch in texts_of(documents, wanted):
            encoded = heldout_pieces(tokenizer, [text for _, text in batch], plan.sequence_length)
            for (name, _), parts in zip(batch, encoded, strict=True):
                found[wanted[name]] = pieces.add(parts)
        numbers = np.asarray([n for place in sorted(found) for n in found[place]], dtype=np.int64)
        if plan.heldout_tokens:
            numbers = numbers[: max(1, nearest(pieces.lengths()[numbers], plan.heldout_tokens))]
        stats = _write_rows(pieces, numbers, plan, folder)
        spelled = np.asarray([len(word) for word in tokenizer.token_bytes()])
        size = targets = 0
        for number in numbers:
            piece = pieces[int(number)]
            wanted_ids = piece.ids[piece.loss == 1]
            targets += len(wanted_ids)
            size += int(spelled[wanted_ids].sum())
    finally:
        pieces.close()
    taken = set(numbers.tolist())
    return {
        "documents": sum(not taken.isdisjoint(found[place]) for place in found),
        "available": len(found),
        "bytes": size,
        "tokens": stats["tokens"],
        "targets": targets,
        "rows": stats["rows"],
    }


def _as_one_row(pieces: Pieces, numbers: Sequence[int]) -> Rows:
    """Pieces one after another; each begins with a token that is no target, or goes on where it was cut."""
    ids: list[np.ndarray] = []
    loss: list[np.ndarray] = []
    total = 0
    for number in numbers:
        if total > BIGRAM_TOKENS:
            break
        piece = pieces[number]
        total += len(piece.ids)
        ids.append(piece.ids)
        loss.append(piece.loss)
    tokens = np.concatenate([np.empty(0, np.int32), *ids])[None, :]
    return Rows(tokens, np.zeros_like(tokens), np.concatenate([np.empty(0, np.uint8), *loss])[None, :])


def _reference(out: Path, vocab_size: int, text: Rows | None, size: int, targets: int) -> Bigram:
    held = list(_rows(out / "heldout"))
    whole = BigramModel(_rows(out / "train", BIGRAM_TOKENS), vocab_size).score(held)
    if whole.targets != targets:
        raise AssertionError(f"{targets} held-out tokens were packed and {whole.targets} can be predicted")
    alone: Score = BigramModel([text], vocab_size).score(held) if text is not None else whole
    return Bigram(whole.nats_per_token, whole.bits_per_byte(size), alone.bits_per_byte(size))


def _rows(folder: Path, most_tokens: int = 0) -> Iterator[Rows]:
    reader = ShardReader(folder)
    most = min(reader.rows, max(1, most_tokens // reader.sequence_length)) if most_tokens else reader.rows
    for start in range(0, most, _ROWS_AT_ONCE):
        yield reader.read(np.arange(start, min(start + _ROWS_AT_ONCE, most)))
