"""Write numbers: the toy pipeline's beginning."""

from __future__ import annotations

from pydantic import Field

from infra.config import Section, StageConfig
from infra.stage import Stage, StageContext


class Shape(Section):
    """How the numbers look."""

    width: int = Field(3, gt=0, description="Digits of a number")
    sign: str = Field("plus", description="plus or minus")


class SourceConfig(StageConfig):
    """What numbers to write."""

    count: int = Field(4, ge=1, description="How many")
    shape: Shape = Field(Shape(width=2), description="Their shape")
    crash: str = Field("", description="How to fail: error, exception, exit or nothing")
    note: str = Field("", description="Text for the log")


def run(config: SourceConfig, context: StageContext) -> None:
    import os

    from infra.errors import HeadwaterError

    print("a library that prints to standard output")
    if config.note:
        context.log(config.note)
    if config.crash == "error":
        raise HeadwaterError("source: the numbers have run out; set count lower")
    if config.crash == "exception":
        raise ValueError("an unforeseen number")
    if config.crash == "exit":
        os._exit(7)
    context.write_json(
        "numbers.json", [config.seed + i * 10**config.shape.width for i in range(config.count)]
    )
    context.metric("count", config.count)
    context.timing("rate", 1.0)


STAGE = Stage(name="source", version=1, config=SourceConfig, run=run)
