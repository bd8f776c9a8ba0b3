"""Overlap of computation and communication in kernel traces, counted by hand and by brute force."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster.pipeline.chrome_trace import TraceError
from infra.cluster.pipeline.kernel_trace import KernelClass, merged, summarise


def kernel(name, start, micros, stream=7, device=0, cat="kernel"):
    args = {"stream": stream, "device": device}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": micros, "args": args}


def trace(path, *events):
    path.write_text(json.dumps({"traceEvents": list(events)}))
    return path


def by_hand(path):
    """Base of a real clock, as a profiler writes it. Two products side by side; dispatch from 30 to 80 us, of
    which 30 to 50 and 60 to 70 are hidden; nothing runs from 80 to 90."""
    base = 1_740_461_679_471_346
    return trace(
        path,
        kernel("void cutlass::device_kernel<GemmKernel>(int)", base, 40),
        kernel("void deep_gemm::m_grouped_fp8_gemm<128>(int)", base + 20, 30, stream=23),
        kernel("void dpsk::ep::internode::dispatch<false, 8>(int4*)", base + 30, 50, stream=27),
        kernel("void cuda::per_token_cast_to_fp8<128>(int)", base + 60, 10, stream=27),
        kernel("void flash::flash_fwd_kernel<192>(int)", base + 90, 10),
        kernel("aten::mm", base, 500, cat="cpu_op"),
    )


def test_the_counts_by_hand(tmp_path):
    summary = summarise(by_hand(tmp_path / "t.json"))
    micros = [summary.span, summary.computation, summary.communication, summary.hidden, summary.idle]
    assert [round(seconds * 1e6, 6) for seconds in micros] == [100, 70, 50, 30, 10]
    assert summary.kernels == 5
    assert summary.hidden_share == pytest.approx(0.6)
    assert [(one.name, one.kernels, round(one.seconds * 1e6, 6)) for one in summary.classes] == [
        ("communication", 1, 50),
        ("GEMM", 1, 40),
        ("grouped GEMM", 1, 30),
        ("casts and transposes", 1, 10),
        ("attention", 1, 10),
    ]


def test_what_communicates_may_be_told_by_stream_or_by_another_name(tmp_path):
    path = by_hand(tmp_path / "t.json")
    by_stream = summarise(path, communication="nothing", streams=[27])
    assert by_stream.communication == pytest.approx(50e-6)
    assert by_stream.hidden == pytest.approx(20e-6)
    by_name = summarise(path, communication="cast", classes={"all": "."})
    assert by_name.classes[0] == KernelClass("all", 4, pytest.approx(130e-6))
    assert by_name.communication == pytest.approx(10e-6)
    nothing = summarise(path, communication="nothing")
    assert (nothing.communication, nothing.hidden_share) == (0, 1)


def test_a_norm_is_no_normal_and_a_copy_is_other(tmp_path):
    path = trace(
        tmp_path / "t.json",
        kernel("void layer_norm::ln_fwd_kernel<1>(int)", 0, 3),
        kernel("distribution_normal_kernel", 0, 2),
        kernel("ncclDevKernel_SendRecv(int)", 0, 1),
    )
    assert [one.name for one in summarise(path).classes] == ["norms", "other", "communication"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12), st.booleans()), min_size=1, max_size=12))
def test_overlap_against_counting_every_microsecond(tmp_path_factory, kernels):
    path = tmp_path_factory.mktemp("t") / "t.json"
    trace(path, *(kernel("nccl" if moves else "gemm", start, micros) for start, micros, moves in kernels))
    summary = summarise(path)
    cells = {
        moves: {
            cell for start, micros, one in kernels if one == moves for cell in range(start, start + micros)
        }
        for moves in (False, True)
    }
    assert summary.computation * 1e6 == pytest.approx(len(cells[False]))
    assert summary.communication * 1e6 == pytest.approx(len(cells[True]))
    assert summary.hidden * 1e6 == pytest.approx(len(cells[False] & cells[True]))
    assert 0 <= summary.hidden_share <= 1


def test_intervals_that_touch_are_one():
    assert merged([(5, 6), (0, 2), (2, 3), (1, 2)]) == [(0, 3), (5, 6)]


def test_traces_that_hold_no_kernels_or_several_devices_are_refused(tmp_path):
    path = trace(tmp_path / "t.json", kernel("aten::mm", 0, 5, cat="cpu_op"))
    with pytest.raises(TraceError, match=r"t\.json: holds no kernels"):
        summarise(path)
    trace(path, kernel("gemm", 0, 5), kernel("gemm", 0, 5, device=1))
    with pytest.raises(TraceError, match="kernels of 2 devices"):
        summarise(path)
    with pytest.raises(TraceError, match="lasts -5 us"):
        summarise(trace(path, kernel("gemm", 0, -5)))
