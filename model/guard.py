"""What to do about a step that went wrong: leave it out, and after several in a row go back to the last
checkpoint.

The report saw no spike that it could not recover from and rolled back nothing (§4.2); runs on other data and
other machines do. A step is bad when its loss or gradient norm is not a number, or when its loss stands out
of the last ones. The batch of a bad step is passed over, also after going back, so that a run does not meet
it again.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GuardConfig:
    spike: float = 0.0
    """How many standard deviations above the mean of the last losses a loss is a spike; 0: none is."""
    window: int = 64
    """How many losses are remembered; none is judged before half as many are there."""
    patience: int = 3
    """Bad steps in a row before the run goes back to its last checkpoint."""
    rollbacks: int = 2
    """How often it goes back before it gives up."""


class Guard:
    """Judges steps; all it remembers is in `state`, plain JSON that travels with the run's position."""

    def __init__(self, config: GuardConfig, state: dict[str, Any]) -> None:
        self.config = config
        self.state = state
        state.setdefault("recent", [])
        state.setdefault("bad", 0)
        state.setdefault("rollbacks", 0)

    def fault(self, loss: float, grad_norm: float) -> str:
        """Why a step is bad, "" if it is not; it is then among the losses that later ones are compared
        with."""
        reason = self._fault(loss, grad_norm)
        if reason:
            self.state["bad"] += 1
            return reason
        self.state["bad"] = 0
        self.state["recent"] = [*self.state["recent"], loss][-self.config.window :]
        return ""

    def _fault(self, loss: float, grad_norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss}, gradient norm {grad_norm}"
        recent = self.state["recent"]
        if not self.config.spike or len(recent) < max(2, self.config.window // 2):
            return ""
        mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
        if loss <= mean + self.config.spike * deviation:
            return ""
        return f"loss {loss:.4g}, where the last {len(recent)} were {mean:.4g} with deviation {deviation:.2g}"

    @property
    def wants_rollback(self) -> bool:
        return self.state["bad"] >= self.config.patience

    @property
    def gives_up(self) -> bool:
        """Whether going back would be once too often."""
        return self.state["rollbacks"] >= self.config.rollbacks
