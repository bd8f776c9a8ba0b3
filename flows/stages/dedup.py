"""Keep one document of each cluster of duplicates, in the batch and against chosen older ones."""

from __future__ import annotations

from pydantic import Field

from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext


class DedupConfig(StageConfig):
    """What counts as a duplicate. An index can only be used by runs with the same ngram, bands, rows and
    seed."""

    ngram: int = Field(5, gt=0, description="Words in a shingle")
    bands: int = Field(14, gt=0, description="MinHash bands; more find less similar pairs")
    rows: int = Field(8, gt=0, description="Minima a band; more make chance meetings rarer")
    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of the shingles from which documents are duplicates"
    )


def run(config: DedupConfig, context: StageContext) -> None:
    import contextlib
    import time

    from data.dedup.deduplicate import Deduplicator
    from data.dedup.index import Settings, read_index, write_index
    from data.dedup.report import write_clusters
    from data.documents import DocumentWriter, iter_documents, write_rejected
    from infra.errors import HeadwaterError

    documents = context.input("documents")
    folder = documents.folder("documents")
    settings = Settings(config.ngram, config.bands, config.rows, config.threshold, config.seed)
    begun = time.perf_counter()
    total = documents.metrics["documents"]
    with contextlib.closing(Deduplicator(settings, context.scratch)) as finder:
        for older in context.inputs_of("index"):
            finder.add_index(read_index(older.folder("index"), settings), older.folder("documents"))
        for place, document in enumerate(iter_documents(folder)):
            finder.add(document)
            if place % 500 == 0:
                context.progress(place, total)
        found = finder.find()
    context.timing("megabytes_per_second", documents.metrics["bytes"] / 1e6 / (time.perf_counter() - begun))

    rejected: list[tuple[str, str, str, str]] = []
    with DocumentWriter(context.out / "documents") as writer:
        for document, verdict in zip(iter_documents(folder), found.verdicts, strict=True):
            if verdict.kept:
                writer.add(document)
            else:
                rejected.append((document.id, document.source, document.path, verdict.reason))
    if not writer.documents:
        # Only an index can do this: of the batch alone, one document of each cluster stays.
        older = ", ".join(one.ref for one in context.inputs_of("index"))
        raise HeadwaterError(
            f"all {len(rejected)} documents of {documents.ref} are duplicates of documents in {older}, the "
            f"first {rejected[0][2]!r} ({rejected[0][3]}). There is nothing new in this batch: leave it out, "
            "or check the index input"
        )
    write_rejected(context.out / "dropped.parquet", rejected)
    write_clusters(context.out / "clusters.parquet", found.verdicts)
    write_index(context.out / "index", found.index, settings)
    exact = sum(verdict.exact for verdict in found.verdicts)
    old = sum(verdict.from_index for verdict in found.verdicts)
    context.write_json(
        "stats.json",
        {
            "read": len(found.verdicts),
            "kept": writer.documents,
            "dropped": len(rejected),
            "bytes": writer.bytes,
            "exact_duplicates": exact,
            "near_duplicates": len(rejected) - exact,
            "duplicates_of_index": old,
            "pairs_compared": found.candidates,
            "pairs_above_threshold": found.duplicates,
        },
    )
    context.metric("documents", writer.documents)
    context.metric("bytes", writer.bytes)
    context.metric("exact_duplicates", exact)
    context.metric("near_duplicates", len(rejected) - exact)
    context.log(f"kept {writer.documents} of {len(found.verdicts)} documents, {exact} exact copies")


STAGE = Stage(
    name="dedup",
    version=1,
    config=DedupConfig,
    run=run,
    figures=("documents", "bytes", "exact_duplicates", "near_duplicates"),
    inputs={
        "documents": InputSpec(("filter", "ingest"), description="The batch"),
        "index": InputSpec(("dedup",), many=True, optional=True, description="Older batches to compare with"),
    },
)
