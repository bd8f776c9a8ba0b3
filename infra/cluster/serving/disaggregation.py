"""Prefill and decode on units of their own, with two sizes of expert parallelism (report §3.4, ISCA §2.3.1).

From the requests that arrive: what each unit does in a second, how many of each kind are needed, what a user
waits for, and what moves between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from infra.cluster.counts.accounting import cache_bytes
from infra.cluster.machines import Machine
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.memory import ServingMemory, serving_memory
from infra.cluster.serving.overlap import Overlap, overlap_decode, overlap_prefill
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError


@dataclass(frozen=True)
class Traffic:
    """Requests as they arrive; lengths are means, in tokens."""

    requests_per_second: float
    prompt: float
    output: float
    cached: float = 0.0
    """Tokens of a prompt whose cache is found from an earlier request, and not computed again."""

    def __post_init__(self) -> None:
        for name in ("requests_per_second", "prompt", "output"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"traffic.{name} is {getattr(self, name)}: it must be positive")
        if not 0 <= self.cached < self.prompt:
            raise ConfigError(
                f"traffic.cached is {self.cached}: it must be at least 0 and less than traffic.prompt, "
                f"{self.prompt}; the last token is always computed"
            )

    @property
    def context(self) -> float:
        """Tokens that an output token sees, on average over a reply."""
        return self.prompt + self.output / 2.0


@dataclass(frozen=True)
class Prefill:
    """One prefill unit under full load."""

    deployment: Deployment
    step: Overlap
    memory: ServingMemory
    computed: float
    """Tokens a second that the unit computes."""
    input: float
    """Tokens a second of prompts, those found in a cache included."""

    @property
    def seconds(self) -> float:
        """Of a step: a prompt is done within one."""
        return self.step.best

    @property
    def input_per_gpu(self) -> float:
        """Prompt tokens a second of one GPU."""
        return self.input / self.deployment.gpus


@dataclass(frozen=True)
class Decode:
    """One decode unit under full load."""

    deployment: Deployment
    step: Overlap
    memory: ServingMemory
    requests: int
    """Of each GPU, at once."""

    @property
    def tpot(self) -> float:
        """Seconds between two tokens of a reply."""
        return self.step.best

    @property
    def concurrent(self) -> int:
        """Requests of the unit at once."""
        return self.requests * self.deployment.gpus

    @property
    def output(self) -> float:
        """Tokens a second of the unit."""
        return self.concurrent / self.tpot

    @property
    def output_per_gpu(self) -> float:
        """Tokens a second of one GPU."""
        return self.output / self.deployment.gpus


@dataclass(frozen=True)
class Disaggregation:
    """Both kinds of units for one traffic."""

    traffic: Traffic
    prefill: Prefill
    decode: Decode
    utilisation: float
    transfer_bytes: float
    """Latent cache that one request takes from a prefill to a decode unit."""
    transfer_seconds: float
    """Of one request over one GPU's port: at most, since layers are sent as they are done."""

    @property
    def prefill_units_exact(self) -> float:
        """Units of prefill before rounding up."""
        demand = self.traffic.requests_per_second * self.traffic.prompt
        return demand / (self.utilisation * self.prefill.input)

    @property
    def decode_units_exact(self) -> float:
        """Units of decode before rounding up."""
        demand = self.traffic.requests_per_second * self.traffic.output
        return demand / (self.utilisation * self.decode.output)

    @property
    def prefill_units(self) -> int:
        return math.ceil(self.prefill_units_exact)

    @property
    def decode_units(self) -> int:
        return math.ceil(self.decode_units_exact)

    @property
    def gpus(self) -> int:
        """All GPUs of the whole units."""
        return (
            self.prefill_units * self.prefill.deployment.gpus
            + self.decode_units * self.decode.deployment.gpus
        )

    @property
    def ttft(self) -> float:
        """Seconds to the first token on average: the rest of the step that runs, and the request's own."""
        return 1.5 * self.prefill.seconds

    @property
    def latency(self) -> float:
        """Seconds to the last token on average."""
        return self.ttft + self.transfer_seconds + (self.traffic.output - 1) * self.decode.tpot

    @property
    def output_per_gpu(self) -> float:
        """Output tokens a second for each GPU of the whole."""
        return self.traffic.requests_per_second * self.traffic.output / self.gpus


def disaggregate(
    shape: ModelShape,
    machine: Machine,
    prefill: Deployment,
    decode: Deployment,
    traffic: Traffic,
    *,
    tpot_limit: float = 0.05,
    prefill_tokens: float = 16384,
    utilisation: float = 0.8,
    prefill_imbalance: float = 1.0,
    decode_imbalance: float = 1.0,
) -> Disaggregation:
    """Size both kinds of units for `traffic`.

    Args:
        tpot_limit: Seconds an output token may take; a decode GPU serves as many requests as this and its
            memory allow.
        prefill_tokens: Tokens of a GPU in a prefill step, both micro-batches (16K in the published profile).
        utilisation: Part of its throughput that a unit is planned for; the rest takes peaks.
        prefill_imbalance: Load of the fullest GPU over the mean, as `Placement.imbalance` gives it.
        decode_imbalance: The same of a decode unit.

    Raises:
        ConfigError: a number is out of bounds, memory holds no request, or `tpot_limit` cannot be met.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is {utilisation}: it must be above 0 and at most 1")
    step = overlap_prefill(
        shape, machine, prefill, prefill_tokens, traffic.prompt, traffic.cached, prefill_imbalance
    )
    computed = prefill.gpus * prefill_tokens / step.best
    memory = serving_memory(shape, machine, prefill, traffic.prompt)
    new = traffic.prompt - traffic.cached
    if memory.requests * new < prefill_tokens:
        raise ConfigError(
            f"prefill_tokens is {prefill_tokens:.0f}, more than the cache of a GPU has room for; "
            f"{memory.requests * new:.0f} fit"
        )
    first = Prefill(
        deployment=prefill,
        step=step,
        memory=memory,
        computed=computed,
        input=computed * traffic.prompt / new,
    )
    transfer = traffic.prompt * cache_bytes(shape)
    return Disaggregation(
        traffic=traffic,
        prefill=first,
        decode=fill_decode(shape, machine, decode, traffic, tpot_limit, decode_imbalance),
        utilisation=utilisation,
        transfer_bytes=transfer,
        transfer_seconds=transfer / machine.network,
    )


def fill_decode(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    traffic: Traffic,
    tpot_limit: float,
    imbalance: float = 1.0,
) -> Decode:
    """A decode unit with the most requests a GPU that memory and `tpot_limit` allow.

    Raises ConfigError where not even one request a GPU is fast enough.
    """
    # Memory is set aside for half-finished replies: on average a request is at its mean context.
    memory = serving_memory(shape, machine, deployment, traffic.context)

    def step(requests: int) -> Overlap:
        return overlap_decode(shape, machine, deployment, requests, traffic.context, imbalance=imbalance)

    fastest = step(1).best
    if fastest > tpot_limit:
        raise ConfigError(
            f"tpot_limit is {tpot_limit * 1e3:g} ms, but one request a GPU already takes "
            f"{fastest * 1e3:.3g} ms on {machine.name}: allow that, or use another deployment"
        )
    low, high = 1, memory.requests + 1
    while high - low > 1:
        middle = (low + high) // 2
        if step(middle).best <= tpot_limit:
            low = middle
        else:
            high = middle
    return Decode(deployment, step(low), memory, low)
