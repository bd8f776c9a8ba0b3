"""What changes over a run, each a pure function of the tokens seen (report §4.2).

The report's run is 14.8T tokens; `Schedule.scaled` keeps its shape for any other length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_REPORT_TOKENS = 14.8e12


@dataclass(frozen=True)
class Schedule:
    """Breakpoints in tokens. The defaults are the report's."""

    total: float = _REPORT_TOKENS
    warmup: float = 2000 * 3072 * 4096
    """Linear rise of the learning rate. The report gives 2000 steps; at its first batch size that is
    25.2B."""
    constant_until: float = 10.0e12
    decay_until: float = 14.3e12
    """End of the cosine; expert bias updates stop here too."""
    tail_until: float = 14.633e12
    """End of the plateau at `floor`; from there to the end `tail`."""
    floor: float = 0.1
    """2.2e-5 / 2.2e-4."""
    tail: float = 7.3e-6 / 2.2e-4
    batch_ramp: float = 469e9
    batch_start: float = 0.2
    """3072 / 15360 sequences. The shape of the ramp is not published; here it is linear in tokens."""
    bias_speed: float = 0.001
    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1

    @classmethod
    def scaled(cls, total: float, warmup: float, **changes: float) -> Schedule:
        """The report's schedule compressed to `total` tokens, with its own warmup length in tokens."""
        ratio = total / _REPORT_TOKENS
        base = cls()
        return replace(
            base,
            total=total,
            warmup=warmup,
            constant_until=base.constant_until * ratio,
            decay_until=base.decay_until * ratio,
            tail_until=base.tail_until * ratio,
            batch_ramp=base.batch_ramp * ratio,
            **changes,
        )

    def lr_scale(self, tokens: float) -> float:
        """Learning rate over its peak."""
        if tokens < self.warmup:
            return tokens / self.warmup
        if tokens < self.constant_until:
            return 1.0
        if tokens < self.decay_until:
            done = (tokens - self.constant_until) / (self.decay_until - self.constant_until)
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        return self.floor if tokens < self.tail_until else self.tail

    def batch_share(self, tokens: float) -> float:
        """Sequences a step over the full batch."""
        if tokens >= self.batch_ramp:
            return 1.0
        return self.batch_start + (1 - self.batch_start) * tokens / self.batch_ramp

    def expert_bias_speed(self, tokens: float) -> float:
        """Gamma of the routing bias update."""
        return self.bias_speed if tokens < self.decay_until else 0.0

    def mtp(self, tokens: float) -> float:
        """Weight lambda of the multi-token loss."""
        return self.mtp_weight if tokens < self.constant_until else self.mtp_weight_late


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Linear rise over `warmup` steps, then cosine from 1 to `floor`: fine-tuning's schedule (§5.1)."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
