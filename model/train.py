"""The training loop: one for pretraining, extension and fine-tuning.

What differs between them is data, and what each step should do: `Step` says it, a function from the run's
position to a Step is the schedule, and everything the loop carries from step to step is in its checkpoint.
A run that is killed and started again goes on from its last checkpoint with the same bits.
Legend: B rows of a batch, T positions.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.cluster.counts.accounting import training_operations
from infra.errors import HeadwaterError
from model.ema import EMA
from model.flops import peak_flops
from model.guard import Guard, GuardConfig
from model.lanes import Lanes
from model.loss import cross_entropy_sum, next_token_losses
from model.optim.build import Optimizer
from model.precision import steady_weights
from model.recompute import recomputing
from model.transformer import Transformer


class BatchSource(Protocol):
    """Rows of packed tokens in a fixed order; a pure function of position, so that resuming needs only a
    number."""

    def stream(self, start: int, count: int) -> dict[str, Tensor]:
        """`tokens` int [B, T], `segments` int [B, T] (-1 padding), `loss` uint8 [B, T] (1: counts when
        predicted)."""
        ...


class CheckpointStore(Protocol):
    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Any: ...

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None: ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step does."""

    rows: int
    lr_scale: float
    mtp_weight: float = 0.0
    bias_speed: float = 0.0


@dataclass
class Position:
    """How far a run is."""

    step: int = 0
    rows: int = 0
    """Place in the data. A batch that was passed over counts here and not under `tokens`."""
    tokens: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    """What the loss guard remembers."""


class TrainingDiverged(HeadwaterError):
    """The loss or the gradient is not a number any more."""


@dataclass(frozen=True)
class LoopConfig:
    balance_weight: float = 1e-4
    """Alpha of the sequence-wise balance loss (§4.2)."""
    micro_rows: int = 16
    """Rows of a micro-batch; a step of more rows accumulates gradients. It decides how sums are rounded."""
    lanes: int = 1
    """Micro-batches side by side, each on one CPU thread; changes no bit of the result. 1 on a GPU."""
    mask_documents: bool = False
    """Keep samples of a row from seeing each other: off in pretraining (§4.1), on in fine-tuning (§5.1)."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    recompute: bool = False
    """Make norms, SwiGLU products and MLA's up-projections again in the backward pass; changes no bit."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When a step is bad, and when to go back."""


def train(
    model: Transformer,
    optimizer: Optimizer,
    source: BatchSource,
    schedule: Callable[[Position], Step | None],
    config: LoopConfig,
    checkpoints: CheckpointStore,
    log_file: Path,
    progress: Callable[[Position, dict[str, float]], None] = lambda position, figures: None,
    watch: Callable[[Position], dict[str, float]] | None = None,
    ema: EMA | None = None,
) -> Position:
    """Train until `schedule` returns None; returns the final position.

    `watch` may measure the model (held-out loss); it is called at each checkpoint and its figures go into
    `log_file`, one JSON line a step. A bad step (see `model.guard`) changes nothing but the place in the
    data; several in a row take the run back to its last checkpoint. Raises TrainingDiverged when there is
    none, or when going back did not help.
    """
    position = resume(model, optimizer, checkpoints, log_file, ema)
    gates = model.gates()
    model.train()
    device = model.embed_tokens.device
    peak = peak_flops(device, model.precision.name)
    # A GPU runs one micro-batch after the other; lanes there would only hold more activations.
    lane_count = config.lanes if device.type == "cpu" else 1
    with log_file.open("a") as log, Lanes(model, lane_count) as lanes:
        while (step := schedule(position)) is not None:
            started = time.perf_counter()
            batch = source.stream(position.rows, step.rows)
            figures, loads = step_gradients(lanes, batch, step, config)
            figures["grad_norm"] = optimizer.clip()
            guard = Guard(config.guard, position.guard)
            if fault := guard.fault(figures["loss"], figures["grad_norm"]):
                optimizer.zero_grad()
                position.rows += step.rows
                log.write(
                    json.dumps({"step": position.step, "tokens": position.tokens, "skipped": fault}) + "\n"
                )
                log.flush()
                if guard.wants_rollback:
                    position = _go_back(position, guard, fault, model, optimizer, checkpoints, ema)
                continue
            optimizer.apply(step.lr_scale)
            for gate, load in zip(gates[: len(loads)], loads, strict=True):
                gate.nudge(load, step.bias_speed)
            if ema is not None:
                ema.update()
            violations = [_violation(load) for load in loads]
            figures["max_violation"] = max(violations, default=0.0)
            figures["lr_scale"] = step.lr_scale
            position.step += 1
            position.rows += step.rows
            tokens, length = batch["tokens"].numel(), batch["tokens"].shape[1]
            position.tokens += tokens
            figures["tokens_per_second"] = tokens / (time.perf_counter() - started)
            if peak:
                work = training_operations(model.config, length, mtp=step.mtp_weight > 0).total
                figures["mfu"] = figures["tokens_per_second"] * work / peak
            last = schedule(position) is None
            keep = last or position.step % config.checkpoint_every == 0
            if keep and watch is not None:
                figures.update(watch(position))
                model.train()
            # Before the checkpoint: a process killed between the two writes this line again when it resumes.
            line = {"step": position.step, "tokens": position.tokens, **figures, "violations": violations}
            log.write(json.dumps(line) + "\n")
            log.flush()
            if keep:
                checkpoints.save(position.step, run_tensors(model, optimizer, ema), asdict(position))
            progress(position, figures)
    return position


def step_gradients(
    lanes: Lanes, batch: dict[str, Tensor], step: Step, config: LoopConfig
) -> tuple[dict[str, float], list[Tensor]]:
    """Accumulate the gradients of one step; the divisor is the step's counted targets, over all
    micro-batches."""
    device = lanes.replicas[0].embed_tokens.device
    tokens_BT = batch["tokens"].to(device).long()
    counted_BT = batch["loss"].to(device).bool()
    rows_BT = batch["segments"].to(device)
    segments_BT = rows_BT if config.mask_documents else None
    valid_BT = rows_BT >= 0
    if segments_BT is not None:
        # Nothing in its own sample predicts a sample's first token.
        counted_BT = counted_BT & F.pad(segments_BT[:, 1:] == segments_BT[:, :-1], (1, 0))
    rows = tokens_BT.shape[0]
    targets = max(1, int(counted_BT[:, 1:].sum()))

    def work(model: Transformer, part: slice) -> tuple[float, float, float, list[Tensor]]:
        segments = None if segments_BT is None else segments_BT[part]
        with recomputing(config.recompute):
            output = model(tokens_BT[part], segments, step.mtp_weight > 0, valid_BT[part])
            losses = next_token_losses(model, output, tokens_BT[part], counted_BT[part], segments)
        share = tokens_BT[part].shape[0] / rows
        mtp = torch.stack(losses.mtp).mean() if losses.mtp else losses.main.new_zeros(())
        prediction = (losses.main + step.mtp_weight * mtp) / targets
        (prediction + config.balance_weight * share * losses.balance).backward()
        return (
            float(losses.main.detach()) / targets,
            float(mtp.detach()) / targets,
            float(losses.balance.detach()) * share,
            [routing.load_E for routing in output.routings],
        )

    parts = [slice(start, start + config.micro_rows) for start in range(0, rows, config.micro_rows)]
    done = lanes.gradients(work, parts)
    loads = [torch.stack(layer).sum(0) for layer in zip(*(part[3] for part in done), strict=True)]
    main, ahead, balance = (sum(part[i] for part in done) for i in range(3))
    return {"loss": main, "mtp_loss": ahead, "balance": balance}, loads


def _violation(load: Tensor) -> float:
    """Largest relative overload of an expert of a layer, MaxVio: max load / mean load - 1."""
    return float(load.max() / load.mean().clamp(min=1e-9)) - 1.0


def _go_back(
    position: Position,
    guard: Guard,
    fault: str,
    model: nn.Module,
    optimizer: Optimizer,
    checkpoints: CheckpointStore,
    ema: EMA | None,
) -> Position:
    """The state of the last checkpoint, at the present place in the data."""
    found = None if guard.gives_up else _restore(model, optimizer, checkpoints, ema)
    if found is None:
        raise TrainingDiverged(
            f"step {position.step}: {fault}, the {guard.state['bad']}th bad step in a row, after "
            f"{guard.state['rollbacks']} returns to a checkpoint. Lower the learning rate, or look at the "
            f"batches before row {position.rows}; the last checkpoint is from before these steps"
        )
    found.rows = position.rows
    found.guard["rollbacks"] = guard.state["rollbacks"] + 1
    return found


def run_tensors(model: nn.Module, optimizer: Optimizer, ema: EMA | None = None) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, for its checkpoint."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state_tensors().items()}
    return tensors | ({f"ema.{name}": value for name, value in ema.tensors().items()} if ema else {})


def _restore(
    model: nn.Module, optimizer: Optimizer, checkpoints: CheckpointStore, ema: EMA | None
) -> Position | None:
    """Load the last checkpoint; None when there is none."""
    found = checkpoints.latest()
    if found is None:
        return None
    _, tensors, state = found

    def part(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    model.load_state_dict(part("model."))
    optimizer.load_state_tensors(part("optimizer."))
    if ema is not None:
        ema.load(part("ema."))
    return Position(**copy.deepcopy(state))


def resume(
    model: nn.Module,
    optimizer: Optimizer,
    checkpoints: CheckpointStore,
    log_file: Path,
    ema: EMA | None = None,
) -> Position:
    """Load the last checkpoint if there is one, and cut the log back to it."""
    position = _restore(model, optimizer, checkpoints, ema)
    if position is None:
        log_file.unlink(missing_ok=True)
        return Position()
    # Steps after the checkpoint were lost with the process; their log lines go too, or they would appear
    # twice. Replaced in one step, so that a process killed here loses none of the older lines.
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    shortened = log_file.with_name(log_file.name + ".tmp")
    shortened.write_text("".join(line + "\n" for line in lines if _step_of(line) <= position.step))
    os.replace(shortened, log_file)
    return position


def _step_of(line: str) -> float:
    """The step that a log line is about; a line that was torn when its process died is after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@torch.no_grad()
def held_out_loss(
    model: Transformer, source: BatchSource, rows: int, batch_rows: int = 16
) -> tuple[float, int]:
    """Mean cross-entropy in nats over counted tokens of the first `rows` rows, and how many there were."""
    model.eval()
    device = model.embed_tokens.device
    total, targets = 0.0, 0
    with steady_weights([model.precision]):
        for start in range(0, rows, batch_rows):
            batch = source.stream(start, min(batch_rows, rows - start))
            tokens_BT, counted = batch["tokens"].to(device).long(), batch["loss"].to(device).bool()[:, 1:]
            states = model(tokens_BT).states_BTD[0][:, :-1][counted]
            total += float(cross_entropy_sum(states, model.lm_head, tokens_BT[:, 1:][counted]))
            targets += int(counted.sum())
    return total / max(1, targets), targets
