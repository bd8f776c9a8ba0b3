"""Drop documents that share a run of words with an evaluation problem."""

from __future__ import annotations

from pydantic import Field

from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext


class DecontaminateConfig(StageConfig):
    """How long a shared run must be."""

    ngram: int = Field(10, gt=0, description="Words of a run that makes a document contaminated")
    min_words: int = Field(
        6, gt=0, description="Evaluation texts shorter than ngram are looked for whole from so many words on"
    )


def run(config: DecontaminateConfig, context: StageContext) -> None:
    import time

    import pyarrow as pa

    from data.decontaminate import Contamination, evaluation_texts
    from data.documents import DocumentWriter, iter_documents
    from infra.errors import HeadwaterError
    from infra.files import write_parquet

    documents = context.input("documents")
    texts = [
        pair
        for artifact in context.inputs_of("evaluation")
        for pair in evaluation_texts(
            artifact.file("heldout.parquet") if artifact.stage == "tasks" else artifact.folder("documents")
        )
    ]
    contamination = Contamination(texts, config.ngram, config.min_words)
    total = documents.metrics["documents"]
    columns: dict[str, list[str]] = {name: [] for name in ("id", "source", "path", "problem", "ngram")}
    read = size = 0
    begun = time.perf_counter()
    with DocumentWriter(context.out / "documents") as writer:
        for document in iter_documents(documents.folder("documents")):
            read += 1
            size += len(document.text)
            if match := contamination.find(document.text):
                row = (document.id, document.source, document.path, match.problem, match.ngram)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
            else:
                writer.add(document)
            if read % 500 == 0:
                context.progress(read, total)
    context.timing("megabytes_per_second", size / 1e6 / (time.perf_counter() - begun))
    dropped = len(columns["id"])
    if read != writer.documents + dropped:
        raise AssertionError(f"{read} documents read, {writer.documents} kept, {dropped} dropped")
    if not writer.documents:
        raise HeadwaterError(
            f"all {read} documents share {config.ngram} words with an evaluation text, the first with "
            f"{columns['problem'][0]}: {columns['ngram'][0]!r}. Check the evaluation input, or raise ngram"
        )
    schema = pa.schema([(name, pa.string()) for name in columns])
    write_parquet(context.out / "matches.parquet", pa.table(columns, schema=schema))
    context.write_json(
        "stats.json",
        {
            "read": read,
            "kept": writer.documents,
            "dropped": dropped,
            "bytes": writer.bytes,
            "evaluation_texts": len(set(texts)),
            "evaluation_texts_long_enough": contamination.texts,
        },
    )
    context.metric("documents", writer.documents)
    context.metric("bytes", writer.bytes)
    context.metric("contaminated", dropped)
    context.metric("evaluation_texts", contamination.texts)
    context.log(f"{dropped} of {read} documents dropped, against {contamination.texts} evaluation texts")


STAGE = Stage(
    name="decontaminate",
    version=1,
    config=DecontaminateConfig,
    run=run,
    figures=("documents", "bytes", "contaminated", "evaluation_texts"),
    inputs={
        "documents": InputSpec(("dedup", "filter", "ingest"), description="Documents to clean"),
        "evaluation": InputSpec(
            ("tasks", "ingest"), many=True, description="Held-out problems, or texts of an evaluation set"
        ),
    },
)
