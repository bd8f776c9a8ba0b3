"""Extend the context with YaRN on the decoupled key, in phases, with the pass-key grid before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from infra.config import ModelStageConfig, Section, placement
from infra.stage import InputSpec, Stage, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from model.train import BatchSource


class Phase(Section):
    """One phase: the factor over the original context, and how long it trains (the report: 8 and 32,
    §4.3)."""

    factor: float = Field(4.0, gt=1, description="Context over the original context")
    steps: int = Field(40, ge=0, description="Optimizer steps")


class ExtendConfig(ModelStageConfig):
    """YaRN factors, fine-tuning on long rows, and the grid that shows what it brings."""

    phases: list[Phase] = Field(
        default_factory=lambda: [Phase()], min_length=1, description="Phases in order"
    )
    batch_rows: int = Field(4, gt=0, description="Long sequences a step")
    micro_rows: int = Field(
        2, gt=0, description="Sequences of a micro-batch; its size decides how gradient sums are rounded"
    )
    lr: float = Field(7.3e-6, gt=0, description="Peak learning rate of AdamW's parameters")
    muon_lr: float = Field(1e-3, gt=0, description="Peak learning rate of Muon's parameters")
    warmup: int = Field(0, ge=0, description="Steps of linear warmup of each phase")
    floor: float = Field(
        1.0, gt=0, le=1, description="Last learning rate over the peak; 1 is constant, as in the report"
    )
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="adamw as in the report, or muon")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="Format of AdamW's moments")
    precision: Literal["fp32", "bf16", "fp8"] = Field("fp32", description="Format of the large products")
    recompute: bool = placement(
        False, description="Make norms, SwiGLU and MLA's up-projections again going back: less memory"
    )
    grid_lengths: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0],
        min_length=1,
        description="Context lengths of the grid, in multiples of the original context",
    )
    grid_depths: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0],
        min_length=1,
        description="Places of the key, 0 start to 1 end",
    )
    grid_repeats: int = Field(8, gt=0, description="Keys asked for a cell of the grid")
    checkpoint_every: int = placement(20, gt=0, description="Steps between checkpoints")


def run(config: ExtendConfig, context: StageContext) -> None:
    import torch

    from data.chat import EOS, ChatTokenizer
    from data.loader import ShardLoader
    from flows import plots
    from flows.training import (
        check_shards,
        checkpoint_metrics,
        copy_tokenizer,
        progress,
        publish_training,
    )
    from infra.checkpoint import Checkpoints
    from infra.errors import HeadwaterError
    from model.checkpoint import load_model, save_model
    from model.device import pick_device
    from model.engine.engine import Engine
    from model.optim.build import OptimizerConfig, build_optimizer
    from model.schedule import cosine
    from model.train import LoopConfig, Position, Step, train
    from post_training.evaluate import PASSKEY_TOKENS, passkey_cells, passkey_grid

    base = context.input("base")
    tokenizer = ChatTokenizer(base.file("tokenizer.json"))
    shards = context.input("shards")
    source = ShardLoader(shards.folder("train"), config.batch_rows, config.seed)
    device = pick_device(config.device)
    model = load_model(base.path, config.precision, device=device)
    original = model.config
    check_shards(
        shards, {ref.digest for ref in base.record.inputs if ref.role == "tokenizer"}, original.vocab_size
    )
    for number, phase in enumerate(config.phases, start=1):
        reach = original.extended(phase.factor).max_position_embeddings
        if phase.steps and source.sequence_length > reach:
            raise HeadwaterError(
                f"rows of {source.sequence_length} tokens do not fit the context of {reach} of extend.phases "
                f"{number} (factor {phase.factor:g}): pack shorter rows, or give that phase a node of its own"
            )
    context_length = original.original_max_position_embeddings
    lengths = sorted({int(multiple * context_length) - PASSKEY_TOKENS for multiple in config.grid_lengths})
    depths = sorted(set(config.grid_depths))
    cells = passkey_cells(tokenizer, lengths, depths, config.grid_repeats, config.seed)
    grids: dict[str, dict[int, dict[float, float]]] = {}

    def measure(name: str) -> None:
        engine = Engine(model, [EOS], max_rows=32, context=lengths[-1] + PASSKEY_TOKENS)
        grids[name] = passkey_grid(engine, tokenizer, cells)
        longest = grids[name][lengths[-1]]
        context.metric(f"passkey_{name}", sum(longest.values()) / len(longest))

    measure("before")
    for number, phase in enumerate(config.phases, start=1):
        extended = original.extended(phase.factor)
        if number == 1:
            model = load_model(base.path, config.precision, config=extended, device=device)
        else:
            save_model(model, context.scratch / "phase")
            model = load_model(context.scratch / "phase", config.precision, config=extended, device=device)
        if number == len(config.phases):
            measure("yarn_alone" if number == 1 else "before_last_phase")
        optimizer = build_optimizer(
            model,
            OptimizerConfig(
                name=config.optimizer,
                lr=config.lr,
                muon_lr=config.muon_lr,
                weight_decay=0.0,
                moments=config.moments,
            ),
        )
        offset = sum(p.steps for p in config.phases[: number - 1]) * config.batch_rows
        steps = phase.steps

        def schedule(position: Position, steps: int = steps) -> Step | None:
            return (
                Step(config.batch_rows, cosine(position.step, steps, config.warmup, config.floor))
                if position.step < steps
                else None
            )

        log_file = context.scratch / f"phase{number}.jsonl"
        train(
            model,
            optimizer,
            _Offset(source, offset),
            schedule,
            LoopConfig(
                micro_rows=config.micro_rows,
                lanes=torch.get_num_threads(),
                checkpoint_every=config.checkpoint_every,
                recompute=config.recompute,
            ),
            Checkpoints(context.scratch / f"checkpoints{number}", log=context.log),
            log_file,
            progress(context, lambda position: position.step, steps),
        )
        publish_training(context, log_file, f"phase{number}")
    measure("after")
    save_model(model, context.out)
    copy_tokenizer(base.file("tokenizer.json"), context)
    by_name = {
        name: {
            str(length): {str(depth): found for depth, found in row.items()} for length, row in grid.items()
        }
        for name, grid in grids.items()
    }
    context.write_json("passkey.json", by_name)
    for name, grid in grids.items():
        plots.heat(
            context.out / "plots" / f"passkey_{name}.png",
            [[grid[length][depth] for length in lengths] for depth in depths],
            [f"{depth:g}" for depth in depths],
            [str(length) for length in lengths],
            f"prompt tokens ({name.replace('_', ' ')})",
            "depth of the key",
        )
    context.metric("context", model.config.max_position_embeddings)
    checkpoint_metrics(context, model)


class _Offset:
    """A batch source that starts further on, so that a later phase sees rows the earlier one did not."""

    def __init__(self, source: BatchSource, offset: int) -> None:
        self.source, self.offset = source, offset

    def stream(self, start: int, count: int) -> dict[str, Tensor]:
        return self.source.stream(self.offset + start, count)


STAGE = Stage(
    name="extend",
    version=1,
    config=ExtendConfig,
    run=run,
    figures=("passkey_before", "passkey_yarn_alone", "passkey_after", "context"),
    inputs={
        "base": InputSpec(("pretrain", "extend"), description="Checkpoint to extend"),
        "shards": InputSpec(("pack",), description="Shards of long rows"),
    },
)
