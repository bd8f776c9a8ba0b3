"""Train a byte-level BPE tokenizer on a sample of the documents."""

from __future__ import annotations

from pydantic import Field

from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext

_DOCUMENTS = ("decontaminate", "dedup", "filter", "ingest")


class TokenizerConfig(StageConfig):
    """Size of the vocabulary and of the sample."""

    vocab_size: int = Field(1024, ge=266, description="Ids, with 10 control tokens and 256 bytes")
    sample_bytes: int = Field(10_000_000, gt=0, description="Bytes of text to train on")
    problem_share: float = Field(
        0.2, ge=0, lt=1, description="Share of the sample taken from the problems, where there are any"
    )
    max_digits: int = Field(3, ge=1, le=3, description="Longest run of digits in a token; 3 as released")


def run(config: TokenizerConfig, context: StageContext) -> None:
    import time

    from data.chat import ChatTokenizer
    from data.sample import problem_sample, text_sample
    from data.tokenizer import measure, train
    from infra.errors import HeadwaterError
    from infra.files import atomic_write_text

    documents = context.input("documents").folder("documents")
    problems = [artifact.file("train.parquet") for artifact in context.inputs_of("problems")]
    from_problems = round(config.sample_bytes * config.problem_share) if problems else 0
    sample, rest = text_sample(documents, config.sample_bytes - from_problems, config.seed)
    sample += problem_sample(problems, from_problems, config.seed)
    size = sum(len(text.encode("utf-8")) for text in sample)
    context.log(f"training on {len(sample)} texts, {size:,} bytes")
    begun = time.perf_counter()
    path = atomic_write_text(
        context.out / "tokenizer.json", train(sample, config.vocab_size, config.max_digits)
    )
    context.timing("train_megabytes_per_second", size / 1e6 / (time.perf_counter() - begun))
    tokenizer = ChatTokenizer(path)
    begun = time.perf_counter()
    fits = {"trained_on": measure(tokenizer, sample), "not_trained_on": measure(tokenizer, rest)}
    measured = sum(fit.bytes for fit in fits.values())
    context.timing("round_trip_megabytes_per_second", measured / 1e6 / (time.perf_counter() - begun))
    failures = sum(fit.failures for fit in fits.values())
    if failures:
        raise HeadwaterError(f"{failures} texts did not come back from the tokenizer unchanged")
    context.write_json(
        "stats.json",
        {
            "vocab_size": tokenizer.vocab_size,
            "sample_texts": len(sample),
            "sample_bytes": size,
            **{
                name: {"texts": fit.documents, "bytes": fit.bytes, "bytes_per_token": fit.bytes_per_token}
                for name, fit in fits.items()
            },
        },
    )
    context.metric("vocab_size", tokenizer.vocab_size)
    context.metric("bytes_per_token", fits["not_trained_on" if rest else "trained_on"].bytes_per_token)
    if tokenizer.vocab_size < config.vocab_size:
        context.log(
            f"the sample has pairs for {tokenizer.vocab_size} ids only, {config.vocab_size} were asked for",
            level="warning",
        )


STAGE = Stage(
    name="tokenizer",
    version=1,
    config=TokenizerConfig,
    run=run,
    figures=("vocab_size", "bytes_per_token"),
    inputs={
        "documents": InputSpec(_DOCUMENTS, description="Documents to take a sample of"),
        "problems": InputSpec(
            ("tasks",), many=True, optional=True, description="Problems whose text joins the sample"
        ),
    },
)
