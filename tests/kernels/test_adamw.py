"""The AdamW step over lists: its definition, any tensors, what it refuses, the table of addresses."""

import importlib.util
import math
import os
import subprocess
import sys
import weakref
from unittest import mock

import numpy as np
import pytest
import torch

from kernels.optim import adamw, tensor_table
from kernels.optim.adamw import adamw_step
from kernels.optim.tensor_table import TensorTable
from tests.kernels.interpreter import needs_interpreter, run_interpreted

SHAPES = [(40, 30), (7,), (), (0, 3), (1, 1), (300, 129), (50_000,), (1025,)]
# What a whole, aligned chunk loads and stores: 16 bytes of FP32 a thread.
ACCESSES = """
from unittest import mock
from kernels import check
from kernels.cases.adamw import cases
inspect = check._inspect
for case in cases():
    found = []
    with mock.patch.object(check, "_inspect", lambda cubin: found.append(inspect(cubin)) or found[0]):
        check.compile_case(case)
    print(case.name, *(found[0][2].count(name) for name in ("LDG.E.128 ", "STG.E.128 ")), sep=";")
"""
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make(shapes=SHAPES, copies=False, seed=0) -> list[list[torch.Tensor]]:
    """Masters, gradients, moments of some steps and copies of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    masters = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) * 10.0 ** -(i % 5) for i, shape in enumerate(shapes)]
    means = [(torch.randn(t.shape, generator=generator) * t.abs()).bfloat16() for t in grads]
    squares = [(torch.rand(t.shape, generator=generator) * t * t).bfloat16() for t in grads]
    return [masters, grads, means, squares, *([[t.bfloat16() for t in masters]] if copies else [])]


def step(columns: list[list[torch.Tensor]], count: int = 3, **changed) -> None:
    copies = columns[4] if len(columns) == 5 else None
    adamw_step(*columns[:4], **{**HYPER, "step": count, "copies": copies, **changed})


def cloned(columns: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[t.clone() for t in column] for column in columns]


def assert_same(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for column, right in zip(found, expected, strict=True):
        for index, (tensor, value) in enumerate(zip(column, right, strict=True)):
            assert torch.equal(tensor.isnan(), value.isnan()), index
            assert torch.equal(tensor.nan_to_num(), value.nan_to_num()), index


def test_every_operation_rounds_on_its_own() -> None:
    """The same operations in the same order, one by one, by NumPy."""
    columns = make([(50_000,)])
    p, g, m, v = (column[0].float().numpy().copy() for column in columns)
    f = [np.float32(value) for value in adamw._factors(**HYPER, step=3)]
    beta1, rest1, beta2, rest2, small, size, decay = f
    step(columns)
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * g) * rest2
    p = p * decay - (m * size) / (np.sqrt(v) + small)
    masters, _, means, squares = (column[0] for column in columns)
    assert torch.equal(masters, torch.from_numpy(p))
    assert torch.equal(means, torch.from_numpy(m).bfloat16())
    assert torch.equal(squares, torch.from_numpy(v).bfloat16())


def test_ten_steps_against_float64() -> None:
    columns = make()
    for column in columns[2:]:
        for t in column:
            t.zero_()
    exact = [[t.double() for t in column] for column in columns]
    generator = torch.Generator().manual_seed(9)
    beta1, beta2 = HYPER["betas"]
    for count in range(1, 11):
        for index, grad in enumerate(columns[1]):
            grad.copy_(torch.randn(grad.shape, generator=generator) * 10.0 ** -(index % 5))
            p, m, v = exact[0][index], exact[2][index], exact[3][index]
            g = grad.double()
            m.mul_(beta1).add_(g * (1 - beta1))
            v.mul_(beta2).add_(g * g * (1 - beta2))
            update = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + HYPER["eps"])
            p.mul_(1 - HYPER["lr"] * HYPER["weight_decay"]).sub_(update * HYPER["lr"])
        step(columns, count)
        # Nothing of the first step is read back from BF16. Later ones move by about lr each.
        limit = 5e-7 if count == 1 else 0.01 * HYPER["lr"] * count
        for found, expected in zip(columns[0], exact[0], strict=True):
            assert (found - expected).abs().le(limit).all(), count
    for found, expected in zip(columns[2] + columns[3], exact[2] + exact[3], strict=True):
        if found.numel() > 100:
            assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_first_step_is_that_of_torch(weight_decay) -> None:
    columns = make()
    for column in columns[2:]:
        for t in column:
            t.zero_()
    parameters = [torch.nn.Parameter(t.clone()) for t in columns[0]]
    for parameter, grad in zip(parameters, columns[1], strict=True):
        parameter.grad = grad.clone()
    torch.optim.AdamW(parameters, **{**HYPER, "weight_decay": weight_decay}).step()
    step(columns, 1, weight_decay=weight_decay)
    for found, expected in zip(columns[0], parameters, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=2e-7, atol=1e-8)


def test_a_list_is_stepped_as_its_tensors_one_by_one() -> None:
    together = make(copies=True)
    apart = cloned(together)
    step(together)
    for index in range(len(SHAPES)):
        step([[column[index]] for column in apart])
    assert_same(together, apart)
    # In bands and joined, wherever they are cut.
    for band, joined in ((1000, 100), (10**6, 10**6), (128, 0)):
        cut = make(copies=True)
        with mock.patch.object(adamw, "BAND", band), mock.patch.object(adamw, "JOINED", joined):
            step(cut)
        assert_same(cut, together)


def test_gradients_in_bf16_and_a_copy_of_the_weights() -> None:
    columns = make(copies=True)
    columns[1] = [t.bfloat16() for t in columns[1]]
    plain = cloned(columns[:4])
    plain[1] = [t.float() for t in plain[1]]
    grads = [t.clone() for t in columns[1]]
    step(columns)
    step(plain)
    for index in (0, 2, 3):
        assert_same([columns[index]], [plain[index]])
    assert_same([columns[1]], [grads])
    assert_same([columns[4]], [[t.bfloat16() for t in columns[0]]])


def test_a_gradient_scale_is_that_of_scaled_gradients() -> None:
    columns = make()
    scaled = cloned(columns)
    scaled[1] = [t * 0.37 for t in scaled[1]]
    grads = [t.clone() for t in columns[1]]
    step(columns, grad_scale=torch.tensor([0.37]))
    step(scaled)
    assert_same(columns, [scaled[0], grads, *scaled[2:]])
    step(columns, grad_scale=torch.tensor(torch.nan))
    assert all(t.isnan().all() for column in (columns[0], columns[2], columns[3]) for t in column)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
@pytest.mark.parametrize("index", [0, 1, 6])
def test_a_gradient_without_a_finite_square_spoils_its_own_weight(bad, index) -> None:
    columns, plain = make(copies=True), make(copies=True)
    columns[1][index].view(-1)[5] = bad
    for count in (1, 2):  # also when the moments are read back
        step(columns, count)
        step(plain, count)
        for column in (columns[0], columns[4]):
            spoiled = [int(t.isnan().sum()) for t in column]
            assert spoiled == [int(i == index) for i in range(len(SHAPES))]
            assert column[index].view(-1)[5].isnan()
        columns[1][index].view(-1)[5] = 0.0
    columns[0][index].view(-1)[5] = plain[0][index].view(-1)[5]
    assert_same([columns[0]], [plain[0]])


def test_zero_gradients_leave_only_decay() -> None:
    masters = [torch.randn(100), torch.randn(3)]
    columns = [masters, *([torch.zeros(t.shape, dtype=d) for t in masters] for d in (torch.float32,))]
    columns += [[torch.zeros(t.shape, dtype=torch.bfloat16) for t in masters] for _ in range(2)]
    expected = [t * (1 - HYPER["lr"] * HYPER["weight_decay"]) for t in masters]
    step(columns, 1)
    assert_same([columns[0]], [expected])


def test_no_tensors_and_only_empty_ones() -> None:
    adamw_step([], [], [], [], **HYPER, step=1)
    step(make([(0,), (3, 0)], copies=True))


def test_parameters_that_need_gradients_are_stepped_in_place() -> None:
    columns = make([(5, 4)])
    parameter = torch.nn.Parameter(columns[0][0].clone())
    expected = cloned(columns)
    step(expected)
    loss = (parameter * parameter).sum()
    step([[parameter], *columns[1:]])
    assert torch.equal(parameter.detach(), expected[0][0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors_name_the_fault() -> None:
    def refused(kind, match, column=None, tensor=None, index=2, **changed):
        columns = make([(4, 3), (4, 3), (4, 3)], copies=True)
        if column is not None:
            columns[column][index] = tensor
        with pytest.raises(kind, match=match):
            step(columns, **changed)

    refused(
        TypeError,
        r"adamw_step: masters\[2\] is torch\.bfloat16.*torch\.float32",
        0,
        torch.ones(4, 3).bfloat16(),
    )
    refused(TypeError, r"grads\[2\] is torch\.bfloat16; gradients are all", 1, torch.ones(4, 3).bfloat16())
    refused(TypeError, r"grads\[0\] is torch\.float64", 1, torch.ones(4, 3).double(), 0)
    for column, name in ((2, "means"), (3, "squares"), (4, "copies")):
        refused(
            TypeError, rf"{name}\[2\] is torch\.float32; it must be torch\.bfloat16", column, torch.ones(4, 3)
        )
    refused(ValueError, r"grads\[1\] has shape \(3, 4\) and masters\[1\] \(4, 3\)", 1, torch.ones(3, 4), 1)
    refused(ValueError, r"grads\[2\] is not contiguous.*\(1, 4\).*\.contiguous\(\)", 1, torch.ones(3, 4).t())
    refused(ValueError, r"masters\[0\] is not contiguous", 0, torch.ones(3, 4).t(), 0)
    refused(ValueError, r"grads\[2\] is on meta and masters\[0\] on cpu", 1, torch.ones(4, 3, device="meta"))
    columns = make([(4, 3), (4, 3)])
    columns[1].pop()
    with pytest.raises(ValueError, match="there are 1 grads and 2 masters"):
        step(columns)
    refused(ValueError, r"grad_scale is torch\.float64", grad_scale=torch.tensor(1.0).double())
    refused(ValueError, r"grad_scale is torch\.float32 \(2,\)", grad_scale=torch.ones(2))
    refused(ValueError, "grad_scale is on meta", grad_scale=torch.ones((), device="meta"))
    for name, values in {
        "lr": (-1.0, math.nan, math.inf),
        "eps": (0.0, -1e-8, math.nan),
        "weight_decay": (-0.1, math.inf),
    }.items():
        for value in values:
            refused(ValueError, rf"adamw_step: {name} is {value}", **{name: value})
    for betas in ((1.0, 0.95), (0.9, 1.0), (-0.1, 0.95), (0.9, math.nan)):
        refused(ValueError, r"adamw_step: betas\[[01]\] is", betas=betas)
    refused(ValueError, "adamw_step: step is 0", count=0)


def test_the_table_describes_every_chunk() -> None:
    columns = [[torch.zeros(n) for n in sizes] for sizes in ((5, 0, 2048, 1025), (5, 0, 2048, 1025))]
    table = TensorTable()
    table.update(1024, columns)
    assert table.owners.tolist() == [0, 2, 2, 3, 3]
    assert table.owners.dtype == torch.int32
    assert table.chunks == 5
    assert table.rows.tolist() == [
        [first, a.numel(), a.data_ptr(), b.data_ptr()]
        for first, a, b in zip((0, 1, 1, 3), *columns, strict=True)
    ]


def test_the_table_follows_tensors_that_move() -> None:
    a, b = [torch.zeros(5), torch.zeros(2000)], [torch.zeros(5), torch.zeros(2000)]
    table = TensorTable()
    table.update(1024, [a, b])
    rows, owners = table.rows, table.owners
    table.update(1024, [list(a), list(b)])
    assert table.rows is rows
    moved = torch.zeros(2000)
    table.update(1024, [a, [b[0], moved]])
    assert table.owners is owners
    assert table.rows[:, 3].tolist() == [b[0].data_ptr(), moved.data_ptr()]
    table.update(512, [a, b])
    assert table.owners.tolist() == [0, 1, 1, 1, 1]
    # The same address, another size.
    table.update(512, [[a[0], a[1][:600]], [b[0], b[1][:600]]])
    assert table.owners.tolist() == [0, 1, 1]
    assert table.rows[1, 1] == 600
    table.update(512, [[a[0]], [b[0]]])
    assert table.rows.shape == (1, 4)


def test_the_table_knows_the_tensors_of_its_last_update() -> None:
    a, b = [torch.zeros(5), torch.zeros(2000)], [torch.zeros(5), torch.zeros(2000)]
    table = TensorTable()
    assert table.known([a, b]) == [False, False]
    table.update(1024, [a, b])
    assert table.known([list(a), b]) == [True, True]
    assert table.known([a]) == [False]
    assert table.known([a[:1], b[:1]]) == [False, False]
    assert table.known([b, a]) == [False, False]
    # Another tensor at the same address may be of another type.
    assert table.known([a, [b[0], b[1].view(torch.int32)]]) == [True, False]
    b[1].data = torch.zeros(2000)
    assert table.known([a, b]) == [True, False]
    gone = weakref.ref(a[0])
    table.update(1024, [a, b])
    del a[0]
    assert gone() is None, "the table keeps a tensor alive"


def test_a_step_looks_again_at_tensors_that_are_new_to_the_table() -> None:
    columns, table = make(), TensorTable()
    table.update(adamw.CHUNK, columns)
    adamw_step(*columns, **HYPER, step=1, table=table)
    columns[2][0] = columns[2][0].float()
    with pytest.raises(TypeError, match=r"means\[0\] is torch.float32"):
        adamw_step(*columns, **HYPER, step=2, table=table)


def test_the_table_of_one_stream_is_not_read_on_another() -> None:
    """Nothing orders the copy that filled it before a kernel there, nor that kernel before its reuse."""
    columns = [[torch.zeros(5), torch.zeros(2000)]]
    table = TensorTable()
    table.update(1024, columns)
    rows, owners = table.rows, table.owners
    with mock.patch.object(tensor_table, "_stream", return_value=7):
        table.update(1024, columns)
        other = table.rows, table.owners
        assert other[0] is not rows
        assert other[1] is not owners
        table.update(1024, columns)
        assert table.rows is other[0]
        assert table.owners is other[1]
    assert torch.equal(rows, table.rows)
    assert torch.equal(owners, table.owners)


def test_a_graph_does_not_capture_addresses_that_may_change() -> None:
    columns = [[torch.zeros(5)]]
    table = TensorTable()
    with mock.patch.object(tensor_table, "_capturing", return_value=True):
        with pytest.raises(RuntimeError, match="CUDA graph"):
            table.update(1024, columns)
    table.update(1024, columns)
    with mock.patch.object(tensor_table, "_capturing", return_value=True):
        table.update(1024, columns)  # nothing has moved


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_adamw.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_whole_chunks_are_loaded_and_stored_sixteen_bytes_at_a_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ACCESSES], env=environment, capture_output=True, text=True, check=True
    )
    counts = {line.split(";")[0]: [int(n) for n in line.split(";")[1:]] for line in done.stdout.splitlines()}
    assert counts["adamw_step grads fp32"] == [2, 1]
    assert counts["adamw_step grads fp32, BF16 copy, scaled"] == [2, 1]
    assert counts["adamw_step grads bf16, BF16 copy, scaled"] == [1, 1]
    assert counts["grad_norm squares fp32"][0] == 8
