"""Whole SwiGLU networks, forward and backward: mlp.py, a dense one and that of each token's expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.functional import silu

from kernels.bench import shapes
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.layers import mlp
from kernels.metrics import relative_error

CHECKED = ((7, 128, 200), (129, 256, 128))  # tokens, hidden, width
EXPERTS_CHECKED = ((40, 128, 200, 8), (300, 256, 128, 3))  # and experts
TIMED = [Shape("dense", (m, shapes.HIDDEN, shapes.DENSE_WIDTH)) for m in shapes.TOKENS]
EXPERTS_TIMED = [
    Shape("experts", (m * shapes.EXPERTS[0], shapes.HIDDEN, shapes.EXPERT_WIDTH, shapes.EXPERTS[0]))
    for m in shapes.TOKENS
]
# Two products of operands in FP8, each of which is wrong by 2.6%, one after the other, and back. The parts
# have checks of their own; this one sees that they are put together rightly.
MAX_ERROR = 0.15

Network = Callable[..., torch.Tensor]
Results = tuple[torch.Tensor, ...]


def flops(tokens: int, hidden: int, width: int, experts: int = 1) -> int:
    """Three products for each of the two layers, of which the first is 2 * width wide."""
    return 3 * 2 * tokens * hidden * 3 * width


def moved(tokens: int, hidden: int, width: int, experts: int = 1) -> int:
    """Bytes of x, y and both their gradients, of the weights and theirs, all BF16."""
    return 2 * (4 * tokens * hidden + 2 * experts * 3 * hidden * width)


def make(draw: Draw, tokens: int, hidden: int, width: int, experts: int = 0, *, dtype: torch.dtype) -> Inputs:
    """x, gate_up, down and dy; with experts, offsets and routing weights before dy."""
    some = (experts,) if experts else ()
    x, dy = (draw.values(tokens, hidden, dtype=dtype, outliers=3.0) for _ in range(2))
    gate_up = (draw.values(*some, 2 * width, hidden, outliers=3.0) * hidden**-0.5).to(dtype)
    down = (draw.values(*some, hidden, width, outliers=3.0) * width**-0.5).to(dtype)
    if not experts:
        return x, gate_up, down, dy
    offsets = torch.tensor(shapes.uneven(tokens, experts), device=draw.device)
    return x, gate_up, down, offsets, draw.uniform(tokens), dy


def forward_and_back(network: Network, *inputs: torch.Tensor) -> Results:
    """y and the gradients of x, gate_up, down and, if there are any, of the routing weights."""
    *given, dy = inputs
    leaves = [part.detach().requires_grad_(part.is_floating_point()) for part in given]
    y = network(*leaves)
    return y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up


def plain(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return swiglu(x @ gate_up.t()) @ down.t()


def experts_apart(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Each expert's rows through its network, times their weights. `offsets` are read on the host."""
    # Split and unbound: the gradient of an index would be as large as all experts.
    parts = x.split(offsets.diff().tolist()), gate_up.unbind(), down.unbind()
    rows = [plain(*part) for part in zip(*parts, strict=True)]
    return torch.cat(rows) * weights[:, None].to(x.dtype)


def apart(*inputs: torch.Tensor) -> Callable[[], Results]:
    """This peer must know the offsets on the host, ours need not: they are copied there untimed."""
    *given, offsets, weights, dy = inputs
    return partial(forward_and_back, experts_apart, *given, torch.tensor(offsets.tolist()), weights, dy)


def grouped_mm(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    ends, product = offsets[1:].int(), torch.nn.functional.grouped_mm
    hidden = swiglu(product(x, gate_up.mT, offs=ends)) * weights[:, None].to(x.dtype)
    return product(hidden, down.mT, offs=ends)


def build(network: Network) -> Callable[..., Callable[[], Results]]:
    return lambda *inputs: partial(forward_and_back, network, *inputs)


def error(inputs: Inputs, found: Results, network: Network) -> float:
    """Against the network without FP8, in float64."""
    exact = forward_and_back(network, *(x.double() if x.is_floating_point() else x for x in inputs))
    return max(relative_error(*pair) for pair in zip(found, exact, strict=True))


def entry(
    name: str, dtype: torch.dtype, checked: Sequence[tuple[int, ...]], timed: Sequence[Shape] = ()
) -> Entry:
    kind, experts = "FP32" if dtype == torch.float32 else "BF16", name == "fp8_experts"
    peers = {f"expert by expert {kind}": apart} if experts else {f"F.linear {kind}": build(plain)}
    if experts and timed:
        peers["F.grouped_mm BF16"] = build(grouped_mm)
    return Entry(
        name,
        f"{kind}, 6 products",
        partial(make, dtype=dtype),
        # Looked up at each call: what is measured is what the module holds.
        lambda *inputs: forward_and_back(getattr(mlp, name), *inputs),
        partial(error, network=experts_apart if experts else plain),
        "relative error of y and all gradients against no FP8",
        MAX_ERROR,
        checked,
        moved=moved,
        flops=flops,
        exact=(),
        timed=timed,
        small=None if timed else (512, 256, 256, *((4,) if experts else ())),
        unit="TFLOPS",
        peers=[Peer(peer, start, "any") for peer, start in peers.items()],
        kernel="gemm_triton",
    )


ENTRIES = [
    entry("fp8_mlp", torch.bfloat16, CHECKED, TIMED),
    entry("fp8_mlp", torch.float32, CHECKED),
    entry("fp8_experts", torch.bfloat16, EXPERTS_CHECKED, EXPERTS_TIMED),
    entry("fp8_experts", torch.float32, EXPERTS_CHECKED),
]
