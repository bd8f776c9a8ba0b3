"""Generate problems with known answers, split into train and held-out by hash of the problem."""

from __future__ import annotations

from pydantic import Field

from infra.config import Section, StageConfig
from infra.stage import Stage, StageContext


class FamilyCount(Section):
    """How many problems of one family."""

    train: int = Field(1000, ge=0, description="Problems to train on")
    held_out: int = Field(0, ge=0, description="Held-out problems")
    size: int = Field(4, ge=0, description="The family's own measure of size, e.g. digits of an operand")


class TasksConfig(StageConfig):
    """Families and how their problems are written out."""

    families: dict[str, FamilyCount] = Field(
        default_factory=lambda: {"addition": FamilyCount(train=1000, held_out=100, size=4)},
        description="Problems by family: addition, reversal, sorting, passkey",
    )
    held_out_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the space of problems never trained on; the same in all nodes of a preset",
    )
    direct_share: float = Field(
        0.0, ge=0, le=1, description="Share of reasoned problems written without thought"
    )
    system_share: float = Field(
        0.0, ge=0, le=1, description="Share of reasoned problems written with the system prompt"
    )


def run(config: TasksConfig, context: StageContext) -> None:
    from infra.errors import HeadwaterError
    from post_training import problem_sets

    if not any(count.train + count.held_out for count in config.families.values()):
        raise HeadwaterError(
            "tasks.families asks for no problem at all: give a family with train or held_out"
        )
    train: list[dict[str, str]] = []
    held: list[dict[str, str]] = []
    for name, count in sorted(config.families.items()):
        wanted = problem_sets.Wanted(name, count.train, count.held_out, count.size)
        learned, kept_back = problem_sets.draw(wanted, config.held_out_share, config.seed)
        train += problem_sets.rows(learned, config.direct_share, config.system_share, config.seed)
        held += problem_sets.rows(kept_back, 0.0, 0.0, config.seed)
        context.log(f"{name}: {len(learned)} to train on, {len(kept_back)} held out")
    problem_sets.write(context.out / "train.parquet", train)
    problem_sets.write(context.out / "heldout.parquet", held)
    context.write_json("stats.json", {"train": len(train), "held_out": len(held)})
    context.metric("train", len(train))
    context.metric("held_out", len(held))


STAGE = Stage(
    name="tasks",
    version=2,
    config=TasksConfig,
    run=run,
    figures=("train", "held_out"),
    # With another share, a node would train on what its neighbour holds out.
    shared=("held_out_share",),
)
