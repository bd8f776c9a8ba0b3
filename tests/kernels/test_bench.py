"""The benchmark: every kernel has an entry, a wrong kernel breaks its limit, failures hide nothing."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import kernels
from kernels import figures
from kernels.bench import FAMILIES, entries, errors, sweep, times
from kernels.bench.__main__ import main
from kernels.bench.clock import Ceilings, cpu_clock, in_turns
from kernels.bench.entry import Draw, Entry, Peer, Shape, each_tensor, tensors
from kernels.formats import quantize
from kernels.fused import swiglu
from kernels.gemms import gemm
from kernels.metrics import relative_error

FIELDS = {"name", "unit", "ours", "peer", "peer_name", "ratio", "goal", "published", "holds"}
ROOT = Path(kernels.__file__).parent


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def launchers() -> set[str]:
    """The functions of this folder that launch a kernel: those called ..._triton."""
    return {
        node.name
        for path in ROOT.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_triton")
        if node.name != "runs_triton"  # that asks where something runs
    }


def test_every_kernel_has_an_entry() -> None:
    found = launchers()
    assert len(found) > 12
    assert found - {entry.kernel or f"{entry.name}_triton" for entry in entries()} == set()


def test_every_family_is_registered() -> None:
    machinery = {
        "__init__",
        "__main__",
        "clock",
        "entry",
        "errors",
        "floors",
        "oracle",
        "shapes",
        "sweep",
        "table",
        "times",
    }
    assert {path.stem for path in (ROOT / "bench").glob("*.py")} - machinery == set(FAMILIES)


def test_every_function_that_is_timed_has_a_small_shape_for_a_cpu() -> None:
    timed = {entry.name for entry in entries() if entry.timed}
    assert timed == {entry.name for entry in entries() if entry.small}


def test_every_check_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--seed", "0", "--json", str(tmp_path / "figures.json")]) == 0
    report = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert set(report) == {"machine", "rows"}
    assert report["machine"]["torch"] == torch.__version__
    assert {"gpu", "driver", "cuda", "multiprocessors"} <= set(report["machine"])
    assert all(set(row) == FIELDS and row["holds"] for row in report["rows"])
    assert {row["name"].partition(":")[0] for row in report["rows"]} == {entry.name for entry in entries()}
    printed = capsys.readouterr().out
    assert "the Triton kernels are not run" in printed
    assert all(row["name"] in printed for row in report["rows"])


def _one_code_off(x: torch.Tensor, block: tuple[int, int], **options: bool) -> quantize.Quantized:
    q = quantize_reference(x, block, **options)
    if q.codes.numel():
        q.codes.view(torch.uint8)[-1, -1] ^= 2  # by two: next to a midpoint by one would be right as well
    return q


quantize_reference = quantize.quantize_reference
true_gemm, true_swiglu = gemm.gemm_reference, swiglu.swiglu_backward_reference


@pytest.mark.parametrize(
    ("module", "function", "broken", "only"),
    [
        (quantize, "quantize_reference", _one_code_off, "quantize_tiles"),
        (gemm, "gemm_reference", lambda a, b, dtype: true_gemm(a, b, dtype) * 1.005, "gemm"),
        (gemm, "gemm_reference", lambda a, b, dtype: torch.empty(a.shape[0], b.shape[0]), "gemm"),
        (swiglu, "swiglu_backward_reference", lambda *given: (true_swiglu(*given)[0], None), "swiglu"),
        (swiglu, "swiglu_backward_reference", lambda *given: true_swiglu(*given, None), "swiglu"),
    ],
    ids=["a code", "a factor", "nothing written", "an output missing", "an exception"],
)
def test_a_wrong_kernel_fails_and_hides_no_other(monkeypatch, capsys, module, function, broken, only) -> None:
    monkeypatch.setattr(module, function, broken)
    assert main(["--check", "--seed", "0", "--only", only]) == 1
    assert "FAIL" in capsys.readouterr().out
    name = "swiglu_quantize" if only == "swiglu" else "gather"
    assert main(["--check", "--seed", "0", "--only", name]) == 0


@pytest.mark.parametrize("name", sorted({entry.name for entry in entries()}))
def test_every_oracle_sees_a_wrong_element(name: str) -> None:
    """One element of each output, off by a visible amount: the oracle must not pass over it."""
    for entry in (entry for entry in entries() if entry.name == name):
        inputs = entry.make(Draw(torch.device("cpu"), 1, rough=True), *entry.checked[1])
        found = entry.call(*each_tensor(torch.clone, inputs))
        assert entry.error(inputs, found) <= entry.limit
        for index in range(len(list(tensors(found)))):
            spoiled = each_tensor(torch.clone, found)
            output = list(tensors(spoiled))[index]
            if output.dtype in (torch.float8_e4m3fn, torch.uint8):
                output.view(torch.uint8).flatten()[0] ^= 2
            elif output.dtype == torch.int64:  # a plan: its parts are found by what they point to
                continue
            else:
                largest = output.abs().flatten().argmax()
                output.flatten()[largest] += 0.2 * output.norm()
            assert not entry.error(inputs, spoiled) <= entry.limit, (str(entry), index)


def test_times_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "grouped", "--json", str(tmp_path / "figures.json")]) == 0
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
    assert all(row["unit"] == "ms" and row["ratio"] == row["ours"] / row["peer"] for row in rows)
    assert "the Triton kernels are not run" in capsys.readouterr().out


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "gem"])
    assert "there is no 'gem'; choose one of" in capsys.readouterr().err


def entry_of(call=lambda x: x * 2, **fields) -> Entry:
    given = {
        "make": lambda draw, n: (draw.values(n),),
        "error": lambda inputs, found: relative_error(found, inputs[0] * 2),
        "measure": "error",
        "limit": 0.0,
        "checked": ((3,), (5,)),
        "moved": lambda n: 8 * n,
    }
    return Entry("double", "", call=call, **{**given, **fields})


def test_the_worst_error_counts_and_nan_is_worse_than_any() -> None:
    for last, holds in ((2.0, True), (3.0, False), (torch.nan, False)):
        entry = entry_of(lambda x, last=last: x * (last if len(x) == 3 else 2.0))
        (row,) = errors.check([entry], torch.device("cpu"), 0)
        assert row.holds is holds


def test_memory_that_a_kernel_leaves_unwritten_is_poisoned() -> None:
    with errors.poisoned():
        assert torch.empty(8).isnan().all()
        assert torch.empty(8, dtype=torch.float8_e4m3fn).float().isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    # A kernel that takes what it finds in new memory for its own, as one that forgets a row does.
    entry = entry_of(lambda x: torch.where(torch.empty(len(x)).isnan(), torch.nan, x * 2))
    (row,) = errors.check([entry], torch.device("cpu"), 0)
    assert not row.holds


def test_differing_counts_elements_whose_bits_differ() -> None:
    a = torch.tensor([1.0, 0.0, torch.nan, 2.0])
    assert errors.differing((a, a), (a.clone(), a.clone())) == 0
    b = torch.tensor([1.0, -0.0, torch.nan, 3.0])
    assert errors.differing((a, a), (a, b)) == 2
    assert errors.differing((a, a), (a, b), which=(0,)) == 0
    assert errors.differing(a, a[:2]) == 4


def test_rows_of_a_case_carry_goals_and_say_which_peers_are_missing() -> None:
    peers = [
        Peer("fast", lambda x: lambda: x * 2, "any", goal=1.5),
        Peer("absent", lambda x: __import__("no_such_module"), "any", published={(4,): 7.0}),
        Peer("elsewhere", lambda x: lambda: x * 2),
    ]
    entry, shape = entry_of(goal=100.0, share=0.8, peers=peers), Shape("layer", (4,))
    calls, missing = times.prepare(entry, (torch.ones(4),), torch.device("cpu"))
    assert list(calls) == ["ours", "fast"]
    assert list(missing) == ["absent"]
    speeds = {"ours": 120.0, "fast": 90.0}
    rows = list(times.case_rows("case", entry, shape, 12.5, speeds, Ceilings(200.0, 800.0), missing))
    time, speed, share, fast, absent = rows
    assert {row.name for row in rows} == {"case"}
    assert (time.unit, time.ours, time.holds) == ("us", 12.5, None)
    assert (speed.ours, speed.goal, speed.holds) == (120.0, 100.0, True)
    assert (share.ours, share.goal, share.holds) == (0.6, 0.8, False)
    assert (fast.ratio, fast.goal, fast.holds) == (120 / 90, 1.5, False)
    assert (absent.peer, absent.ratio, absent.holds, absent.published) == (None, None, None, 7.0)
    assert "no_such_module" in absent.peer_name


def test_a_case_is_measured() -> None:
    """What a GPU is measured with, on a CPU: its own draw and clock."""
    entry, shape = entry_of(unit="GB/s"), Shape("layer", (2**20,))
    draw = Draw(torch.device("cpu"), 0, rough=False)
    time, speed, share = times.measure(entry, shape, draw, cpu_clock, Ceilings(10.0, 1.0))
    assert time.name == "double layer 1048576"
    assert time.ours > 0
    assert speed.ours == pytest.approx(8 * 2**20 / (1e3 * time.ours))
    assert share.ours == pytest.approx(speed.ours / 10)


def test_the_whole_command_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """All of it but the GPU: one line a case, a failing kernel hides no other, missed goals fail nothing."""
    shaped = [dataclasses.replace(e, timed=[Shape("tiny", e.small)]) for e in entries() if e.small]
    broken = entry_of(lambda x: x.no_such_method(), timed=[Shape("tiny", (4,))])
    monkeypatch.setattr(
        "kernels.bench.__main__.entries", lambda only: [broken, shaped[-1]] if only else shaped
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(times, "ROUNDS", 1)
    monkeypatch.setattr(times, "gpu_clock", lambda: cpu_clock)
    monkeypatch.setattr(times, "ceilings", lambda clock, rounds: Ceilings(1e6, 1e6))
    monkeypatch.setattr(
        times, "Draw", lambda device, seed, rough: Draw(torch.device("cpu"), seed, rough=rough)
    )
    assert main(["--seed", "0"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{entry} tiny" in printed for entry in shaped)
    assert "misses 0.8" in printed
    assert "goals are missed, 0 rows fail" in printed
    assert main(["--only", "all"]) == 1
    printed = capsys.readouterr().out
    assert "failed: double tiny 4: AttributeError" in printed
    assert f"{shaped[-1]} tiny" in printed


def test_a_sweep_finds_the_best_launch_and_reports_the_broken() -> None:
    def launches(x: torch.Tensor) -> dict:
        def refused() -> torch.Tensor:
            raise RuntimeError("out of shared memory")

        slow = lambda: [x * 2 for _ in range(20)][-1]  # noqa: E731
        return {"slow": slow, "fast": lambda: x * 2, "wrong": lambda: x * 3, "refused": refused}

    draw = Draw(torch.device("cpu"), 0, rough=False)
    rows = list(sweep.sweep(entry_of(launches=launches), Shape("layer", (2**16,)), draw, cpu_clock))
    assert [row.name for row in rows] == [
        "double layer 65536 by wrong: RuntimeError: the result differs by 0.5",
        "double layer 65536 by refused: RuntimeError: out of shared memory",
        "double layer 65536 by slow",
        "double layer 65536 by fast",
        "double layer 65536: best by fast",
    ]
    assert rows[-1].ours == rows[-2].ours
    assert rows[-1].ratio == rows[-1].ours / rows[-1].peer


def test_a_sweep_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sweep"])
    assert "--sweep times kernels on a GPU" in capsys.readouterr().err


def test_a_peer_with_another_result_is_not_timed() -> None:
    entry = entry_of(peers=[Peer("wrong", lambda x: lambda: x * 3, "any")])
    with pytest.raises(RuntimeError, match=r"wrong differs from ours by 0\.5"):
        times.prepare(entry, (torch.ones(4),), torch.device("cpu"))


def test_a_failure_is_a_row_and_hides_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cannot run\nat all")

    chosen = [dataclasses.replace(entry_of(broken), small=(4,)), dataclasses.replace(entry_of(), small=(4,))]
    rows = [row for found in times.time_cpu(chosen, 0) for row in found]
    assert [row.holds for row in rows] == [False, None, None]
    assert rows[0].name == "double reference 4: RuntimeError: cannot run"
    monkeypatch.setattr("kernels.bench.__main__.entries", lambda only: chosen)
    assert main([]) == 1
    assert "1 rows fail" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fp8_grouped_linear", "fp8_experts"])
def test_a_peer_that_reads_offsets_on_the_host_does_so_untimed(name: str) -> None:
    found = 0
    for entry in entries(name):
        inputs = entry.make(Draw(torch.device("cpu"), 0, rough=False), *entry.checked[1])
        offsets = next(part for part in inputs if part.dtype == torch.int64)
        for peer in (peer for peer in entry.peers if peer.name.startswith("expert by expert")):
            call = peer.build(*inputs)
            expected = call()
            kept = offsets.clone()
            offsets.zero_()  # had the call read them, it would fail
            assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))
            offsets.copy_(kept)
            found += 1
    assert found == len(entries(name))


def test_calls_run_in_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    assert set(in_turns(calls, cpu_clock, 3)) == {"a", "b"}
    assert order == list("abababab")


def test_nan_holds_no_limit() -> None:
    assert not figures.at_most("error", "", float("nan"), 1.0).holds
    assert not figures.at_least("count", "", float("nan"), 1.0).holds
