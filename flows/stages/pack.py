"""Mix documents and problems, encode them and pack them into token shards."""

from __future__ import annotations

from pydantic import Field

from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext

_DOCUMENTS = ("decontaminate", "dedup", "filter", "ingest")


class PackConfig(StageConfig):
    """How much of what, and in which form."""

    sequence_length: int = Field(256, ge=32, description="Tokens in a row")
    token_budget: int = Field(2_000_000, gt=0, description="Tokens of all training rows together, about")
    mixture: dict[str, float] = Field(
        default_factory=lambda: {"text": 1.0},
        description='Weights by source: "text" for the documents, and the names of problem families',
    )
    heldout_share: float = Field(
        0.05, gt=0, lt=1, description="Share of the documents' files kept out of training"
    )
    heldout_tokens: int = Field(
        50_000, ge=0, description="Held-out tokens at most, about; 0 = all of the share"
    )
    fim_rate: float = Field(0.1, ge=0, le=1, description="Share of documents with the middle last")
    split_rate: float = Field(
        0.0, ge=0, le=1, description="Share of combined punctuation and line-break tokens that are split"
    )
    direct_share: float = Field(
        0.0, ge=0, le=1, description="Share of problems whose thought is left out, beside what tasks left out"
    )
    prompt_loss: bool = Field(True, description="Problems' prompts are targets too, as all text is")
    mix_below: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Pieces shorter than this share of a row are packed in random order. Sorted by length as "
        "the longer ones are, nearly every row would hold pieces of one kind; the fill is 1% lower",
    )


def run(config: PackConfig, context: StageContext) -> None:
    import time

    from data.assemble import Plan, assemble
    from data.chat import ChatTokenizer

    tokenizer = ChatTokenizer(context.input("tokenizer").file("tokenizer.json"))
    plan = Plan(**{name: getattr(config, name) for name in Plan.__dataclass_fields__})
    begun = time.perf_counter()
    stats = assemble(
        context.input("documents").folder("documents"),
        [artifact.file("train.parquet") for artifact in context.inputs_of("problems")],
        tokenizer,
        plan,
        context.out,
        context.scratch,
        context.log,
        context.progress,
    )
    context.timing("tokens_per_second", stats["tokens"] / (time.perf_counter() - begun))
    context.write_json("stats.json", stats)
    for name in ("tokens", "rows", "fill", "vocab_size", "sequence_length"):
        context.metric(name, stats[name])
    for name, source in stats["sources"].items():
        context.metric(f"epochs_{name}", source["epochs"])
    context.metric("heldout_bytes", stats["heldout"]["bytes"])
    context.metric("heldout_tokens", stats["heldout"]["tokens"])
    context.metric("bigram_nats_per_token", stats["bigram"]["nats_per_token"])
    context.metric("bigram_bits_per_byte", stats["bigram"]["bits_per_byte"])
    context.metric("bigram_text_bits_per_byte", stats["bigram"]["text_bits_per_byte"])


STAGE = Stage(
    name="pack",
    version=1,
    config=PackConfig,
    run=run,
    figures=("tokens", "fill", "heldout_bytes", "bigram_bits_per_byte"),
    shared=("heldout_share",),
    inputs={
        "documents": InputSpec(_DOCUMENTS, description="Documents for the text part"),
        "problems": InputSpec(("tasks",), many=True, optional=True, description="Problems, by family"),
        "tokenizer": InputSpec(("tokenizer",), description="The tokenizer to encode with"),
    },
)
