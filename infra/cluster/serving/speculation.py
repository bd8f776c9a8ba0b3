"""Speculative decoding with MTP modules: what a step yields, and what it costs more (report §5.4.3).

A step verifies each request's drafts together with its next token, so it handles 1 + drafts tokens a
request. While weights and cache bind, that costs little more; once products bind, it costs that many times
as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.serving.communication import point_to_point
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.overlap import overlap_decode
from infra.cluster.serving.roofline import decode_step, draft_step
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError


@dataclass(frozen=True)
class Speculation:
    """Seconds of a step, and the speed-up over decoding without drafts."""

    acceptance: float
    drafts: int
    plain: float
    """A step without drafts: one token a request."""
    verify: float
    """The main model's step over 1 + drafts tokens a request."""
    draft: float
    """All runs of the MTP modules for the next step."""
    products: float
    """Part of the verifying step that products bind, 0 to 1."""

    @property
    def tokens(self) -> float:
        """Tokens a request and step."""
        return expected_tokens(self.acceptance, self.drafts)

    @property
    def speedup(self) -> float:
        """Tokens a second over those without drafts; below 1 where drafts do not pay."""
        return self.tokens * self.plain / (self.verify + self.draft)


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens of a step when each draft is accepted with `acceptance` if those before it were.

    1 + a + a^2 + ... + a^drafts: the last term of accepted drafts is followed by the model's own token.
    """
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"acceptance is {acceptance}: it must be between 0 and 1")
    if drafts < 0:
        raise ConfigError(f"drafts is {drafts}: it must not be negative")
    return float(sum(acceptance**n for n in range(drafts + 1)))


def speculate(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    requests: float,
    context: float,
    acceptance: float,
    drafts: int = 1,
    communication: bool = False,
) -> Speculation:
    """Speculative decoding of `requests` a GPU at `context` tokens.

    More drafts than the model has MTP modules come from the last module, run again on its own output. The
    first run takes in all the tokens that the step verified; each takes the output head for one token.
    With `communication` steps include the all-to-alls, overlapped where that is faster; a draft's are not.

    Raises ConfigError where the model has no MTP module or a number is out of bounds.
    """
    if shape.num_nextn_predict_layers < 1:
        raise ConfigError("num_nextn_predict_layers is 0: the model has no MTP module to draft with")
    if drafts < 1:
        raise ConfigError(f"drafts is {drafts}: it must be at least 1")
    expected_tokens(acceptance, drafts)

    def step(queries: int) -> float:
        if communication:
            return overlap_decode(shape, machine, deployment, requests, context, queries).best
        return decode_step(shape, machine, deployment, requests, context, queries).seconds

    def draft(queries: int) -> float:
        seconds = draft_step(shape, machine, deployment, requests, context, queries).seconds
        if communication:
            sent = point_to_point(shape, machine, deployment, requests * queries)
            seconds += sent.dispatch + sent.combine
        return seconds

    verifying = decode_step(shape, machine, deployment, requests, context, 1 + drafts)
    return Speculation(
        acceptance=acceptance,
        drafts=drafts,
        plain=step(1),
        verify=step(1 + drafts),
        draft=draft(1 + drafts) + (drafts - 1) * draft(1),
        products=verifying.share("products"),
    )
