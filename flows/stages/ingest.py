"""Read raw files into documents, every file accounted for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from infra.config import StageConfig, placement
from infra.stage import SourceFile, Stage, StageContext

if TYPE_CHECKING:
    from data.sources.base import Reading


class IngestConfig(StageConfig):
    """Where the text comes from, and how much of it."""

    # Where files lie is no part of what they say: the scan puts their names and content into the fingerprint.
    sources: str = placement(
        "builtin",
        description="Comma-separated: builtin (stdlib,sysdocs), stdlib, sysdocs, datasets:<name or folder>, "
        "a folder, a git checkout, a file",
    )
    max_bytes: int = Field(16_000_000, ge=0, description="Bytes of text to keep at most, 0 = all")
    max_document_bytes: int = Field(
        2_000_000, gt=0, description="Larger documents are quarantined, in bytes of text"
    )
    error_budget: float = Field(
        0.05, ge=0, le=1, description="Largest share of documents that may be quarantined"
    )
    text_field: str = Field(
        "text", description="Field of JSON lines, Parquet and data sets that holds the text"
    )
    licence_field: str = Field("", description="Field that holds the licence, if there is one")
    licence: str = Field("unknown", description="Licence of documents whose source names none")
    split: str = Field("train", description="Split of a data set")
    subset: str = Field("", description="Subset (configuration) of a data set")

    @field_validator("sources")
    @classmethod
    def _from_any_folder(cls, words: str) -> str:
        """Record where the sources are, not how they are called from the folder of the moment."""
        from data.sources.words import absolute

        return absolute(words)


def _reading(config: IngestConfig) -> Reading:
    from data.sources.base import Reading

    return Reading(
        text_field=config.text_field,
        licence_field=config.licence_field,
        licence=config.licence,
        max_document_bytes=config.max_document_bytes,
    )


def scan(config: IngestConfig) -> list[SourceFile]:
    """The files that will be read, with the hash of their content."""
    from data.choose import choose
    from data.sources.resolve import resolve

    sources = resolve(config.sources, config.split, config.subset)
    choice = choose(sources, config.max_bytes, _reading(config))
    return [SourceFile(*row) for row in choice.manifest()]


def run(config: IngestConfig, context: StageContext) -> None:
    import time

    from data.choose import choose
    from data.documents import DocumentWriter, write_rejected
    from data.ingest import check_budget, ingest
    from data.sources.resolve import resolve

    sources = resolve(config.sources, config.split, config.subset)
    reading = _reading(config)
    choice = choose(sources, config.max_bytes, reading)
    scanned = {one.path: one.sha256 for one in context.sources} if context.sources else None
    begun = time.perf_counter()
    with DocumentWriter(context.out / "documents") as writer:
        account = ingest(choice, reading, config.max_bytes, writer, scanned, context.progress)
    context.timing("megabytes_per_second", account.kept_bytes / 1e6 / (time.perf_counter() - begun))
    for path in account.quarantined_first:
        context.log(f"quarantined: {path}", level="warning")
    if account.skipped:
        first = ", ".join(account.skipped_first)
        context.log(f"{account.skipped.total()} files or folders skipped by name, first: {first}")
    check_budget(account, config.error_budget)
    write_rejected(context.out / "rejected.parquet", account.rejected)
    context.write_json("stats.json", account.summary())
    context.metric("documents", account.kept)
    context.metric("bytes", account.kept_bytes)
    context.metric("quarantined", account.quarantined.total())
    context.log(f"{account.kept} documents, {account.kept_bytes:,} bytes, of {len(choice.files)} files")


STAGE = Stage(
    name="ingest",
    version=2,
    config=IngestConfig,
    run=run,
    scan=scan,
    figures=("documents", "bytes", "quarantined"),
)
