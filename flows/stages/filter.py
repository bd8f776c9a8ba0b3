"""Drop documents of low quality, with a reason for each."""

from __future__ import annotations

from pydantic import Field

from infra.config import Section, StageConfig
from infra.stage import InputSpec, Stage, StageContext


class TextRules(Section):
    """Rules for prose. Where a default is not that of the paper it comes from, the description names both."""

    min_chars: int = Field(100, ge=0, description="Shorter documents are dropped, in characters")
    max_chars: int = Field(
        100_000, ge=0, description="Longer documents are dropped (lists, logs), in characters; 0 = none"
    )
    gopher_quality: bool = Field(True, description="Apply Gopher's quality rules")
    min_words: int = Field(50, ge=0, description="Gopher: fewest words")
    min_alphabetic_words: float = Field(
        0.7, ge=0, le=1, description="Gopher: least share of words with a letter (0.8 there, for web pages)"
    )
    english: bool = Field(True, description="Gopher: ask for two different English stop words")
    gopher_repetition: bool = Field(True, description="Apply Gopher's repetition rules")
    repetition_scale: float = Field(1.0, gt=0, description="Factor on all of Gopher's repetition thresholds")
    fineweb: bool = Field(True, description="Apply FineWeb's line rules")
    min_punctuated: float = Field(
        0.05, ge=0, le=1, description="FineWeb: least share of lines that end a sentence (0.12 there)"
    )
    max_short_lines: float = Field(
        0.67, ge=0, le=1, description="FineWeb: largest share of lines up to 30 letters"
    )
    max_repeated_chars: float = Field(
        0.1, ge=0, le=1, description="FineWeb: largest share of characters in repeated lines (0.01 there)"
    )
    max_newlines_per_word: float = Field(0.3, ge=0, description="FineWeb: most line breaks a word")


class CodeRules(Section):
    """Rules for source code."""

    min_chars: int = Field(100, ge=0, description="Shorter documents are dropped, in characters")
    max_chars: int = Field(
        100_000, ge=0, description="Longer documents are dropped (tables), in characters; 0 = none"
    )
    max_line: int = Field(1000, gt=0, description="Longest line, in characters")
    max_mean_line: float = Field(100.0, gt=0, description="Longest mean line, in characters")
    min_alphabetic: float = Field(0.25, ge=0, le=1, description="Least share of letters among the characters")
    drop_generated: bool = Field(True, description="Drop files whose head says that a program wrote them")


class FilterConfig(StageConfig):
    """Which rules apply, by kind of document."""

    text: TextRules = Field(default_factory=TextRules, description="Rules for prose")
    code: CodeRules = Field(default_factory=CodeRules, description="Rules for source code")
    integrity: bool = Field(True, description="Drop text damaged by wrong decoding, and encoded data")
    keep_everything: bool = Field(False, description="Only pass documents on, for a corpus already filtered")


def run(config: FilterConfig, context: StageContext) -> None:
    import time

    from data.documents import DocumentWriter, iter_documents, write_rejected
    from data.filters.chain import Chain
    from infra.errors import HeadwaterError

    documents = context.input("documents")
    chain = Chain(_filters(config))
    rejected: list[tuple[str, str, str, str]] = []
    total = documents.metrics["documents"]
    read = size = 0
    begun = time.perf_counter()
    with DocumentWriter(context.out / "documents") as writer:
        for document in iter_documents(documents.folder("documents")):
            read += 1
            size += len(document.text)
            if reason := chain.check(document):
                rejected.append((document.id, document.source, document.path, reason))
            else:
                writer.add(document)
            if read % 500 == 0:
                context.progress(read, total)
    context.timing("megabytes_per_second", size / 1e6 / (time.perf_counter() - begun))
    if read != writer.documents + len(rejected):
        raise AssertionError(f"{read} documents read, {writer.documents} kept, {len(rejected)} dropped")
    if not writer.documents:
        raise HeadwaterError(
            f"the filters kept none of {read} documents: {chain.worst()}. Loosen that rule, or set "
            "filter.keep_everything=true"
        )
    write_rejected(context.out / "dropped.parquet", rejected)
    context.write_json(
        "stats.json",
        {
            "read": read,
            "kept": writer.documents,
            "dropped": len(rejected),
            "bytes": writer.bytes,
            "dropped_by_reason": dict(chain.dropped),
            "seen_by_filter": dict(chain.seen),
        },
    )
    context.metric("documents", writer.documents)
    context.metric("bytes", writer.bytes)
    context.metric("dropped", len(rejected))
    context.log(f"kept {writer.documents} of {read} documents; {chain.worst()}")


def _filters(config: FilterConfig) -> dict[str, list]:
    from data.filters.code import Code
    from data.filters.fineweb import FineWebLines
    from data.filters.gopher_quality import GopherQuality
    from data.filters.gopher_repetition import GopherRepetition
    from data.filters.integrity import Integrity
    from data.filters.length import Length

    if config.keep_everything:
        return {"text": [], "code": []}
    text, code = config.text, config.code
    whole = [Integrity()] if config.integrity else []
    prose: list = [Length(text.min_chars, text.max_chars), *whole]
    if text.gopher_quality:
        prose.append(
            GopherQuality(
                min_words=text.min_words,
                min_alphabetic_words=text.min_alphabetic_words,
                min_stop_words=2 if text.english else 0,
            )
        )
    if text.gopher_repetition:
        prose.append(GopherRepetition(scale=text.repetition_scale))
    if text.fineweb:
        prose.append(
            FineWebLines(
                min_punctuated=text.min_punctuated,
                max_short_lines=text.max_short_lines,
                max_repeated_chars=text.max_repeated_chars,
                max_newlines_per_word=text.max_newlines_per_word,
            )
        )
    source = Code(
        max_line=code.max_line,
        max_mean_line=code.max_mean_line,
        min_alphabetic=code.min_alphabetic,
        drop_generated=code.drop_generated,
    )
    return {"text": prose, "code": [Length(code.min_chars, code.max_chars), *whole, source]}


STAGE = Stage(
    name="filter",
    version=1,
    config=FilterConfig,
    run=run,
    figures=("documents", "bytes", "dropped"),
    inputs={"documents": InputSpec(("ingest",), description="Documents as read")},
)
