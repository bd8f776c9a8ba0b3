"""The kernels of adamw.py and grad_norm.py on a GPU: bit for bit the references on the CPU."""

import pytest
import torch

from kernels.optim.adamw import adamw_step
from kernels.optim.grad_norm import clip_scale, grad_norm
from kernels.optim.tensor_table import TensorTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1,), (), (0,), (3, 341), (1024,), (1025,), (256, 1024), (7, 129, 5), (3_000_001,)]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BAD = (torch.nan, -torch.nan, torch.inf, -torch.inf, 1e25, 1e-25, 2.0**-140, 0.0)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, a NaN of any bits being equal to another."""
    found, bits = found.cpu(), torch.int32 if expected.dtype == torch.float32 else torch.int16
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(7.0).view(bits), expected.nan_to_num(7.0).view(bits)
    )


def placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy on the GPU that starts `offset` elements into its memory."""
    buffer = torch.empty(values.numel() + offset, dtype=values.dtype, device="cuda")
    return buffer[offset:].view(values.shape).copy_(values)


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    grads = []
    for shape in SHAPES:
        grad = torch.randn(shape, generator=generator)
        grad *= 10.0 ** torch.randint(-6, 4, shape, generator=generator)
        if step == 3 and grad.numel() > 100:
            grad.view(-1)[-len(BAD) :] = torch.tensor(BAD)
        grads.append(grad.to(dtype))
    return grads


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_cpu(dtype, copies, scale, offset) -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(shape, generator=generator) for shape in SHAPES]
    bf16 = [[torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES] for _ in range(2 + copies)]
    found = [[placed(t, offset) for t in column] for column in (masters, *bf16)]
    table = TensorTable()
    for step in range(1, 5):
        grads = gradients(step, dtype)
        on_gpu = [placed(grad, offset) for grad in grads]
        for columns, grad in (((masters, *bf16), grads), (found, on_gpu)):
            adamw_step(
                columns[0],
                grad,
                columns[1],
                columns[2],
                **HYPER,
                step=step,
                copies=columns[3] if copies else None,
                grad_scale=None if scale is None else torch.tensor(scale, device=grad[0].device),
                table=table,
            )
        for column, expected in zip(found, (masters, *bf16), strict=True):
            for index, (tensor, value) in enumerate(zip(column, expected, strict=True)):
                assert same(tensor, value), (step, index)
        for tensor, value in zip(on_gpu, grads, strict=True):
            assert same(tensor, value)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_cpu(dtype, offset) -> None:
    for step in (1, 3):
        grads = gradients(step, dtype)
        norm = grad_norm([placed(grad, offset) for grad in grads])
        assert norm.shape == ()
        assert same(norm, grad_norm(grads))
        assert same(clip_scale(norm, 1.0), clip_scale(grad_norm(grads), 1.0))
    many = [torch.full((1,), 0.5, dtype=dtype) for _ in range(9000)]  # two levels of sums
    assert same(grad_norm([grad.cuda() for grad in many]), grad_norm(many))
    assert float(grad_norm([torch.empty(0, dtype=dtype, device="cuda")])) == 0


def test_a_tensor_of_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 1025
    if torch.cuda.mem_get_info()[0] < 16 * count:
        pytest.skip("needs 32 GiB of free GPU memory")
    master, grad = torch.ones(count, device="cuda"), torch.ones(count, device="cuda")
    mean, square = (torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    adamw_step([master], [grad], [mean], [square], **HYPER, step=1)
    alone = [torch.ones(1), torch.ones(1), torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16()]
    adamw_step(*([t] for t in alone), **HYPER, step=1)
    for tensor, value in zip((master, grad, mean, square), alone, strict=True):
        assert bool((tensor == value.cuda()).all())
    assert float(grad_norm([grad])) == pytest.approx(count**0.5, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_and_norms_never_wait_for_the_device() -> None:
    masters = [torch.randn(2000, device="cuda"), torch.randn(3, 5, device="cuda")]
    means = [torch.zeros_like(t, dtype=torch.bfloat16) for t in masters]
    squares = [torch.zeros_like(t, dtype=torch.bfloat16) for t in masters]
    tables = TensorTable(), TensorTable()
    kept = []

    def step(count: int) -> None:
        grads = [torch.ones_like(t) for t in masters]
        kept.append(grads)  # so that the next ones lie elsewhere and the tables are made anew
        scale = clip_scale(grad_norm(grads, table=tables[0]), 1.0)
        adamw_step(masters, grads, means, squares, **HYPER, step=count, grad_scale=scale, table=tables[1])

    step(1)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
        step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert masters[0].isfinite().all()


def test_a_table_follows_to_another_stream() -> None:
    master, grad = torch.ones(2000, device="cuda"), torch.ones(2000, device="cuda")
    mean, square = (torch.zeros(2000, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    table, side = TensorTable(), torch.cuda.Stream()
    rows = []
    for step, stream in enumerate((torch.cuda.current_stream(), side, side), start=1):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            adamw_step([master], [grad], [mean], [square], **HYPER, step=step, table=table)
        rows.append(table.rows)
    torch.cuda.synchronize()
    assert rows[1] is not rows[0]
    assert rows[2] is rows[1]
    alone = [torch.ones(1), torch.ones(1), torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16()]
    for step in range(1, 4):
        adamw_step(*([t] for t in alone), **HYPER, step=step)
    for tensor, value in zip((master, grad, mean, square), alone, strict=True):
        assert bool((tensor == value.cuda()).all())


def test_a_backward_pass_with_old_weights_is_refused() -> None:
    master = torch.nn.Parameter(torch.ones(2000, device="cuda"))
    moments = [torch.zeros(2000, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    loss = (master * master).sum()
    adamw_step([master], [torch.ones(2000, device="cuda")], moments[:1], moments[1:], **HYPER, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    values = [torch.ones(3000), torch.ones(3000), torch.zeros(3000).bfloat16(), torch.zeros(3000).bfloat16()]
    other = [t.to("cuda:1") for t in values]
    for columns in (values, other):
        adamw_step(*([t] for t in columns), **HYPER, step=1)
    for found, expected in zip(other, values, strict=True):
        assert same(found, expected)
    assert same(grad_norm([other[1]]), grad_norm([values[1]]))
