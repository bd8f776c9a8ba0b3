"""Hardware as the planner sees it: peaks, what kernels reach of them, links, SMs lent to communication.

Peaks are data sheets, dense, without sparsity. `Rates` are shares of a peak that real kernels were seen to
reach; none is fitted to the time of a training step. A cluster of your own is a JSON file of the same fields,
of which those left out are taken from the machine that it names as `like`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, nearest


@dataclass(frozen=True)
class Rates:
    """Shares of the peak, counted on the SMs that a kernel runs on; `memory` of the memory bandwidth.

    The defaults were read from the profile that DeepSeek published of one overlapped forward and backward
    chunk (deepseek-ai/profile-data at 4496024, train.json; four MoE layers, EP64, on 112 of an H800's 132
    SMs): operations by the layers' shapes over the kernels' summed time.
    """

    gemm: float = 0.535
    """FP8 dense GEMMs, forward and for the input's gradient: 899 TFLOPS on 112 SMs."""
    grouped: float = 0.600
    """FP8 grouped GEMMs of the experts, forward and for the input's gradient: 1,007 TFLOPS."""
    wgrad: float = 0.348
    """FP8 GEMMs of weight gradients, dense and by expert: 584 TFLOPS."""
    attention: float = 0.661
    """Attention forward in BF16, causal half alone counted: 555 TFLOPS."""
    attention_backward: float = 0.500
    """The same going back, 2.6 times the operations: 420 TFLOPS with its pre- and postprocessing."""
    plain: float = 0.75
    """GEMMs in BF16 or FP32 by cuBLAS: 742 of 989 TFLOPS; not in the profile, as measured on an H200."""
    stream: float = 0.85
    """Reading weights or a cache once, of the memory bandwidth: a large copy reaches 0.89 on an H200."""
    memory: float = 0.452
    """Everything else, by the bytes that it moves: the 41.8 GB that `training.operators` counts in that pair,
    in the 27.6 ms of its computation that are neither products nor attention."""


@dataclass(frozen=True)
class Machine:
    """A GPU, its node, and the network between nodes. Bandwidths are of one direction and one GPU."""

    name: str
    memory: float
    """Bytes of one GPU."""
    memory_bandwidth: float
    """Bytes a second of one GPU's memory."""
    fp8: float
    """Peak operations a second; 0 where the GPU has no FP8."""
    bf16: float
    fp32: float
    """Peak of FP32 products outside of the tensor cores."""
    multiprocessors: int
    gpus_per_node: int
    """Those that NVLink joins."""
    nvlink: float
    """Bytes a second that a GPU really sends to others of its node."""
    network: float
    """Bytes a second that a GPU really sends to other nodes; positive also where there is but one node."""
    nvlink_latency: float = 3.33e-6
    """Seconds of a small message inside a node (ISCA'25, table 5)."""
    network_latency: float = 3.7e-6
    """Seconds of a small message between nodes, across leaves (ISCA'25, table 5, InfiniBand)."""
    communication_sms: int = 20
    """SMs that all-to-all kernels hold while they run beside computation (report §3.2.2)."""
    rates: Rates = field(default_factory=Rates)
    source: str = ""
    """Where the figures come from."""

    def __post_init__(self) -> None:
        if not isinstance(self.rates, Rates):
            raise ConfigError(f"machine.rates is {self.rates!r}: it must be shares of the peak")
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"machine.{name} is {getattr(self, name)!r}: it must be text")
        for f in fields(self):
            if f.name not in ("name", "source", "rates"):
                _number(f"machine.{f.name}", getattr(self, f.name), zero=f.name in _MAY_BE_ZERO)
        for f in fields(self.rates):
            _number(f"machine.rates.{f.name}", value := getattr(self.rates, f.name))
            if value > 1:
                raise ConfigError(f"machine.rates.{f.name} is {value}: a share of the peak is at most 1")
        for name in ("multiprocessors", "gpus_per_node", "communication_sms"):
            if not isinstance(value := getattr(self, name), int):
                raise ConfigError(
                    f"machine.{name} is {value}: it must be a whole number, such as {int(value)}"
                )
        if self.communication_sms >= self.multiprocessors:
            raise ConfigError(
                f"machine.communication_sms is {self.communication_sms}, all of the {self.multiprocessors} "
                "multiprocessors: leave some to compute"
            )

    def peak(self, precision: str) -> float:
        """Operations a second of a GEMM's operands: `fp8`, `bf16` or `fp32`."""
        peak = {"fp8": self.fp8, "bf16": self.bf16, "fp32": self.fp32}[precision]
        if not peak:
            raise ConfigError(f"{self.name} has no {precision}: plan with precision bf16")
        return peak


_MAY_BE_ZERO = ("fp8", "communication_sms", "nvlink_latency", "network_latency")


def _number(where: str, value: Any, zero: bool = False) -> None:
    """Refuse what is no finite number, is negative, or is 0 unless that is allowed."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{where} is {value!r}: it must be a number, not below 0")
    if value == 0 and not zero:
        raise ConfigError(f"{where} is 0: it must be positive")


_HOPPER = {
    "fp8": 1979e12,
    "bf16": 989.5e12,
    "fp32": 67e12,
    "multiprocessors": 132,
    "gpus_per_node": 8,
    "network": 40e9,
}

MACHINES: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            "h800",
            memory=81559 * 2**20,
            memory_bandwidth=3.35e12,
            nvlink=160e9,
            source="data sheet; NVLink 160 GB/s and 40 of 50 GB/s a port as published (ISCA'25 §4)",
            **_HOPPER,
        ),
        Machine(
            "h100",
            memory=81559 * 2**20,
            memory_bandwidth=3.35e12,
            nvlink=360e9,
            source="data sheet; NVLink at the share of its 450 GB/s that the H800's reaches of 200",
            **_HOPPER,
        ),
        Machine(
            "h200",
            memory=143771 * 2**20,
            memory_bandwidth=4.8e12,
            nvlink=360e9,
            source="data sheet; NVLink as the H100's",
            **_HOPPER,
        ),
        Machine(
            "gb200-nvl72",
            memory=186e9,
            memory_bandwidth=8e12,
            fp8=5e15,
            bf16=2.5e15,
            fp32=80e12,
            multiprocessors=148,
            gpus_per_node=72,
            nvlink=726e9,
            network=40e9,
            communication_sms=0,
            source="data sheet, dense; of NVLink's 900 GB/s what DeepEP's README shows for its dispatch; the "
            "network, latencies and kernels' shares are an H800's",
        ),
    )
}


def load_machine(name_or_path: str) -> Machine:
    """A machine by name, or from a JSON file of `Machine`'s fields.

    Raises ConfigError naming the file and field for anything unknown, missing or out of range.
    """
    if name_or_path in MACHINES:
        return MACHINES[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".json":
        raise ConfigError(
            f"no machine is named {name_or_path!r}; {nearest(name_or_path, MACHINES)} (or give a .json file)"
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the machine: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(
            f"{path}: a machine is a JSON object of {', '.join(f.name for f in fields(Machine))}"
        )
    like = given.pop("like", "h800")
    if not isinstance(like, str) or like not in MACHINES:
        raise ConfigError(f"{path}: like: no machine is named {like!r}; {nearest(str(like), MACHINES)}")
    base = MACHINES[like]
    rates = given.pop("rates", {})
    _known(rates, Rates, f"{path}: rates")
    _known(given, Machine, str(path))
    try:
        return replace(base, **{"name": path.stem} | given, rates=replace(base.rates, **rates))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _known(given: Any, kind: type, where: str) -> None:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: must be a JSON object")
    names = [f.name for f in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            raise ConfigError(f"{where}: unknown field {name!r}; {nearest(name, names)}")
