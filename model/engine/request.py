"""What is asked of the engine, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.engine.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and the rules for choosing what follows."""

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Update:
    """What one step made for one request. `finish` is None while more is to come, and "failed" when the
    model's output was not finite."""

    ticket: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str | None = None
    stopped_by: str | None = None


@dataclass
class Completion:
    """Generated ids (the stop token included), the log-probability of each under the untempered model, and
    why generation ended: "stop" or "length"; `stopped_by` is the stop string that ended it, if one did."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str = "length"
    stopped_by: str | None = None

    def add(self, update: Update) -> None:
        self.tokens += update.tokens
        self.log_probs += update.log_probs
        if update.finish is not None:
            self.finish, self.stopped_by = update.finish, update.stopped_by
