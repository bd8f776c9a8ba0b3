"""FP8 layers on a GPU: the gradients of the CPU, whichever way they are taken, and no wait for the device."""

import itertools

import pytest
import torch

from kernels.fused.permute import plan_rows, unpermute
from kernels.layers.activation import fp8_activation, permute_fp8
from kernels.layers.linear import fp8_linear
from kernels.layers.mlp import fp8_experts, fp8_mlp
from kernels.layers.weight import FP8Weights
from kernels.layers.wgrad import WgradQueue
from kernels.metrics import relative_error


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "needs a GPU with E4M3 instructions (compute capability 8.9)"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs here")]
SIZES = [0, 3, 130, 0, 70, 128]
# A few codes lie next to a midpoint, and fall on its other side where a sum was rounded otherwise.
LIMIT = 5e-3


def make(hidden: int, width: int) -> list[torch.Tensor]:
    """x, gate_up, down, routing weights, dy and offsets, on the CPU; 9 rows belong to no expert."""
    generator = torch.Generator().manual_seed(hidden)
    rows, experts = sum(SIZES) + 9, len(SIZES)
    return [
        torch.randn(rows, hidden, generator=generator).bfloat16(),
        torch.randn(experts, 2 * width, hidden, generator=generator) * 2 / hidden**0.5,
        torch.randn(experts, hidden, width, generator=generator) / width**0.5,
        torch.rand(rows, generator=generator),
        (torch.randn(rows, hidden, generator=generator) * 1e-4).bfloat16(),
        torch.tensor([0, *itertools.accumulate(SIZES)]),
    ]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(256, 128), (200, 70), (1024, 512)])
def test_experts_are_those_of_the_cpu(hidden, width, power_of_two) -> None:
    found = []
    for device in ("cuda", "cpu"):
        x, gate_up, down, weights, dy, offsets = (t.to(device) for t in make(hidden, width))
        leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
        y = fp8_experts(x, gate_up, down, offsets, weights, power_of_two=power_of_two)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one.cpu(), other.double()) < LIMIT
    assert not found[0][0][-9:].any()
    assert not found[0][1][-9:].any()


@pytest.mark.parametrize("e5m6", [False, True])
def test_every_way_to_a_weight_gradient_gives_the_same_bits(e5m6) -> None:
    x, gate_up, down, weights, dy, offsets = (t.cuda() for t in make(256, 128))
    for kind in ("linear", "mlp", "experts"):
        used = [gate_up, down] if kind == "experts" else [gate_up[1], down[1]][: 1 + (kind == "mlp")]
        used = [w.detach().clone().requires_grad_() for w in used]
        gradient = dy if kind != "linear" else dy[:, :1].expand(-1, 256)

        def run(source, copies=(None, None), main_grads=(None, None), queue=None, kind=kind, used=used):
            if kind == "linear":
                options = {"copy": copies[0], "main_grad": main_grads[0], "e5m6": e5m6, "queue": queue}
                return fp8_linear(source, used[0], **options)
            options = {
                "copies": None if copies[0] is None else copies,
                "main_grads": None if main_grads[0] is None else main_grads,
                "queue": queue,
            }
            if kind == "mlp":
                return fp8_mlp(source, *used, **options)
            return fp8_experts(source, *used, offsets, weights, **options)

        leaf = x.detach().requires_grad_()
        expected = torch.autograd.grad(run(leaf), (leaf, *used), gradient)
        main_grads = tuple(torch.zeros_like(w) for w in used)
        with FP8Weights() as copies, WgradQueue() as queue:
            made = tuple(copies.of(w) for w in used)
            run(leaf, copies=made, main_grads=main_grads, queue=queue).backward(gradient)
            queue.run()
        assert torch.equal(leaf.grad, expected[0])
        for one, other in zip(main_grads, expected[1:], strict=True):
            assert torch.equal(one, other)


def test_an_optimizer_step_inside_the_scope_is_an_error() -> None:
    weight = torch.randn(256, 256, device="cuda").requires_grad_()
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)

    def step() -> None:
        with FP8Weights() as copies:
            copies.of(weight)
            optimizer.step()

    with pytest.raises(RuntimeError, match="was written while"):
        step()


def test_dispatch_experts_and_combine_never_wait_for_the_gpu() -> None:
    x, gate_up, down, _, _, _ = (t.cuda() for t in make(256, 128))
    leaves = [t.detach().requires_grad_() for t in (x, gate_up, down)]
    chosen = torch.rand(len(x), len(SIZES), device="cuda").topk(2, dim=1).indices
    scores = torch.rand(len(x), 2, device="cuda").requires_grad_()

    def step() -> None:
        plan = plan_rows(chosen, len(SIZES))
        sent = permute_fp8(fp8_activation(leaves[0], power_of_two=True), plan)
        weights = scores.flatten().index_select(0, plan.pair)
        y = fp8_experts(sent, *leaves[1:], plan.offsets, weights, power_of_two=True)
        unpermute(y, plan).backward(x)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_model_trains_on_the_gpu_as_on_the_cpu() -> None:
    from model.precision import steady_weights
    from tests.model.tiny import tiny, tokens

    losses = []
    for device in ("cuda", "cpu"):
        model = tiny(precision="fp8", hidden_size=256, moe_intermediate_size=128).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        batch, found = tokens(4, 32).to(device), []
        for _ in range(3):
            with steady_weights([model.precision]):
                logits = model.logits(model(batch).states_BTD[0])[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0][-1] < losses[0][0]
