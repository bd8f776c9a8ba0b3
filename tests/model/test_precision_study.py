"""FP8 against BF16: the statistics on series worked by hand, what a run changes, and the command."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.formats.quantize
from infra.errors import HeadwaterError
from model.precision import Precision
from model.precision_study import __main__ as command
from model.precision_study import collect as collecting
from model.precision_study import report
from model.precision_study.collect import collect
from model.precision_study.comparison import compare, curve_difference, ema, largest_difference
from model.precision_study.emulation import WideProducts
from model.precision_study.runs import NOISE, VARIANTS, one_run, perturb, use_precision
from model.precision_study.setting import SETTINGS, SMALL, Setting
from model.precision_study.text import Rows, standard_library
from tests.model.tiny import TINY, tiny, tokens

QUICK = Setting(
    name="quick",
    config=replace(TINY, vocab_size=256, num_hidden_layers=2),
    rows=2,
    length=32,
    steps=2,
    warmup=1,
    lr=1e-3,
    held_out_rows=4,
    text_bytes=20_000,
)
CPU = torch.device("cpu")


def test_the_moving_average_starts_at_the_first_loss():
    assert ema([4.0, 2.0, 3.0], 0.5) == [4.0, 3.0, 3.0]
    assert ema([1.0, 2.0]) == pytest.approx([1.0, 1.1])
    assert ema([]) == []


def test_curves_are_compared_step_by_step():
    # Averages 2, 2.1 and 1, 1: a fall at the start is not counted, a difference in the second half is.
    assert curve_difference([2.0, 3.0], [1.0, 1.0]) == pytest.approx([1.0, 1.1])
    assert largest_difference([9.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]) == 0
    assert largest_difference([1.0, 1.0, 1.0, 0.5], [1.0] * 4) == pytest.approx(0.05)
    assert largest_difference([5.0, *[1.0] * 99], [1.0] * 100) < 0.03
    with pytest.raises(ValueError):
        curve_difference([1.0], [1.0, 1.0])


def test_a_comparison_worked_by_hand():
    found = compare({0: 1.02, 1: 2.0, 2: 5.0}, {0: [0.98, 1.0, 1.02], 1: [2.0, 2.0]})
    assert found.excess == pytest.approx([0.02, 0.0])  # seed 2 has no family
    assert found.mean == pytest.approx(0.01)
    assert found.error == pytest.approx(0.01)  # deviation sqrt(2) * 0.01, two seeds
    assert found.upper == pytest.approx(0.03)
    # Squares 2 * 0.02**2 over (3 - 1) + (2 - 1) degrees of freedom.
    assert found.spread == pytest.approx(math.sqrt(0.0008 / 3))
    assert found.band == pytest.approx(2 * found.spread * math.sqrt((4 / 3 + 3 / 2) / 4))
    assert found.inside
    assert not compare({0: 1.1}, {0: [0.98, 1.0, 1.02]}).inside


def test_a_comparison_of_too_few_runs_says_so():
    found = compare({0: 1.1}, {0: [1.0]})
    assert found.mean == pytest.approx(0.1)
    assert math.isnan(found.error)
    assert math.isnan(found.band)
    assert not found.inside
    with pytest.raises(ValueError, match="no seed has a run"):
        compare({0: 1.0}, {1: [1.0]})


def test_the_band_holds_nineteen_of_twenty_draws_of_noise():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(2000):
        losses = (2 + 0.01 * torch.randn(4, 4, generator=generator, dtype=torch.float64)).tolist()
        families = {seed: draws[1:] for seed, draws in enumerate(losses)}
        inside += compare({seed: draws[0] for seed, draws in enumerate(losses)}, families).inside
    assert 0.90 < inside / 2000 < 0.96  # the spread itself is estimated, from 8 degrees of freedom


class _Seen(TorchDispatchMode):
    """Records the type of every product that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(word in func.name() for word in ("mm", "attention")):
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_a_step_in_bf16_has_no_product_in_bf16_that_is_not_widened():
    model = tiny(precision="bf16")
    with _Seen() as seen, WideProducts():
        model(tokens(2, 8), mtp=True).states_BTD[0].float().sum().backward()
    assert len(seen.types) > 50
    assert set(seen.types) == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_a_wide_product_is_rounded_once():
    a, b = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        for shape in ((5, 70), (70, 6))
    )
    rounded = (a.float() @ b.float()).bfloat16()
    out = torch.empty_like(rounded)
    with WideProducts():
        assert torch.equal(a @ b, rounded)
        assert torch.mm(a, b, out=out) is out
        assert torch.equal(out, rounded)
        assert torch.equal(torch.bmm(a[None], b[None])[0], rounded)
        assert torch.equal(torch.addmm(rounded, a, b), (rounded.float() + a.float() @ b.float()).bfloat16())
        assert (a.float() @ b.float()).dtype == torch.float32


def test_wide_attention_is_attention():
    q, k, v = (
        torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(n)).bfloat16().requires_grad_()
        for n in range(3)
    )
    with WideProducts():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.sum().backward()
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, is_causal=True)
    exact.sum().backward()
    assert out.dtype == q.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=2.0**-8, atol=1e-6)
    for narrow, full in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(narrow.grad.float(), full.grad, rtol=2.0**-5, atol=2e-2)


def test_text_is_the_same_every_time_and_of_the_length_asked_for():
    text = standard_library(30_000)
    assert len(text) == 30_000
    assert text == standard_library(40_000)[:30_000]
    assert b"\0" in text
    with pytest.raises(HeadwaterError, match="smaller setting"):
        standard_library(10**10)


def test_rows_are_the_text_in_an_order_of_the_seed():
    text = bytes(range(1, 41)) + b"cut"
    plain = Rows(text, 4)
    assert plain.stream(0, 2)["tokens"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    one, same, other = Rows(text, 4, 1), Rows(text, 4, 1), Rows(text, 4, 2)
    epoch = one.stream(0, 10)["tokens"]
    assert torch.equal(epoch, same.stream(0, 10)["tokens"])
    assert not torch.equal(epoch, other.stream(0, 10)["tokens"])
    assert sorted(epoch.flatten().tolist()) == list(range(1, 41))
    assert torch.equal(one.stream(7, 10)["tokens"], epoch.roll(-7, 0))
    with pytest.raises(ValueError, match="3 bytes"):
        Rows(b"abc", 4)


def test_noise_is_as_large_as_a_rounding():
    model, plain, again = tiny(), tiny(), tiny()
    perturb(model, seed=1)
    perturb(again, seed=2)
    for noisy, weight, other in zip(model.parameters(), plain.parameters(), again.parameters(), strict=True):
        change = (noisy / weight - 1).abs().max()
        assert 0.5 * NOISE < change < 1.001 * NOISE
        assert not torch.equal(noisy, other)


def test_powers_of_two_reach_every_layer(monkeypatch):
    scales = []
    original = kernels.formats.quantize._scales

    def spy(amax, power_of_two):
        found = original(amax, power_of_two)
        scales.append(found)
        return found

    monkeypatch.setattr(kernels.formats.quantize, "_scales", spy)
    model = tiny(precision="fp8")

    def all_powers_of_two():
        scales.clear()
        model(tokens(1, 8)).states_BTD[0].float().sum().backward()
        assert scales
        return all((found.frexp().mantissa == 0.5).all() for found in scales)

    assert not all_powers_of_two()
    use_precision(model, Precision("fp8", power_of_two=True))
    assert all_powers_of_two()


def test_a_run_repeats_and_variants_differ():
    text = standard_library(QUICK.text_bytes)
    runs = {name: one_run(QUICK, name, 0, text, CPU) for name in VARIANTS}
    again = one_run(QUICK, "fp8", 0, text, CPU)
    assert again["losses"] == runs["fp8"]["losses"]
    assert again["held_out"] == runs["fp8"]["held_out"]
    assert all(len(run["losses"]) == QUICK.steps for run in runs.values())
    for quantity in ("losses", "held_out"):
        assert len({str(run[quantity]) for run in runs.values()}) == len(VARIANTS)
    read = runs["bf16"]["held_out_in_fp8"]
    assert read != runs["bf16"]["held_out"]
    assert read == pytest.approx(runs["bf16"]["held_out"], rel=0.01)
    assert "held_out_in_fp8" not in runs["fp8"]
    first = runs["bf16"]["losses"][0]
    for name in ("fp8", "noise1"):  # same weights but for rounding, same batch
        assert runs[name]["losses"][0] == pytest.approx(first, rel=0.02)


def quick_runs(file: Path, variants: tuple[str, ...] = ("bf16", "noise1")) -> list[dict[str, Any]]:
    return list(collect(file, QUICK, range(2), variants, CPU))


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    file = tmp_path / "new" / "runs.jsonl"
    every = quick_runs(file)
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    assert [(run["seed"], run["variant"]) for run in every] == [
        (0, "bf16"), (0, "noise1"), (1, "bf16"), (1, "noise1"),
    ]  # fmt: skip
    file.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the third run
    made = []

    def counted(setting, variant, seed, text, device):
        made.append((variant, seed))
        return one_run(setting, variant, seed, text, device)

    monkeypatch.setattr(collecting, "one_run", counted)
    resumed = quick_runs(file)
    assert made == [("bf16", 1), ("noise1", 1)]
    for old, new in zip(every, resumed, strict=True):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}
    made.clear()
    quick_runs(file)
    assert not made


def test_runs_of_another_study_are_refused(tmp_path):
    file = tmp_path / "runs.jsonl"
    quick_runs(file, ("bf16",))
    with pytest.raises(HeadwaterError, match="runs of another setting"):
        next(collect(file, replace(QUICK, lr=2e-3), range(1), ("bf16",), CPU))
    header, *rest = file.read_text().splitlines()
    changed = {**json.loads(header), "machine": {"cpu": "another"}}
    file.write_text("\n".join([json.dumps(changed), *rest, ""]))
    with pytest.raises(HeadwaterError, match="runs of another machine"):
        quick_runs(file)
    file.write_text("hello\n")
    with pytest.raises(HeadwaterError, match="is no file of runs"):
        quick_runs(file)


def line(variant: str, seed: int, loss: float) -> dict[str, Any]:
    run = {"variant": variant, "seed": seed, "losses": [loss] * 4, "held_out": loss}
    return run | ({"held_out_in_fp8": 1.01 * loss} if variant == "bf16" else {})


def test_figures_say_what_holds():
    controls = [line("bf16", s, 2.0) for s in (0, 1)] + [line("noise1", s, 2.002) for s in (0, 1)]
    near = {row.name: row for row in report.rows([*controls, line("fp8", 0, 2.001), line("fp8", 1, 2.002)])}
    band = "FP8, held-out loss over BF16's: |mean|, goal the band of noise"
    upper = "FP8, held-out loss over BF16's: mean and twice its error"
    assert near[band].ours == pytest.approx(100 * 0.0005 / 2.001)
    assert near[band].holds
    assert near[upper].holds
    assert near["BF16, noise1: largest difference of curves over all seeds"].ours == pytest.approx(0.1)
    far = {row.name: row for row in report.rows([*controls, line("fp8", 0, 2.02), line("fp8", 1, 2.03)])}
    assert not far[band].holds
    assert not far[upper].holds
    # The mean of two and their difference: half of it is the standard error.
    assert far[upper].ours == pytest.approx(100 * ((2.025 + 0.01) / 2.001 - 1))


def test_figures_of_a_study_that_has_just_begun():
    assert [row.ours for row in report.rows([line("bf16", 0, 2.0)])] == pytest.approx([1.0, 1.0])
    assert report.rows([line("noise1", 0, 2.0)]) == []
    rows = report.rows([line("bf16", 0, 2.0), line("fp8", 0, 2.1)])
    assert rows
    assert all(row.ours == row.ours for row in rows)


def test_the_command_writes_runs_figures_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SETTINGS, "small", QUICK)
    arguments = ["--folder", str(tmp_path), "--size", "small", "--seeds", "1", "--device", "cpu"]
    assert command.main([*arguments, "--variants", "bf16", "fp8", "noise1"]) == 0
    assert len((tmp_path / "precision_runs.jsonl").read_text().splitlines()) == 1 + 3
    figures = json.loads((tmp_path / "precision.json").read_text())
    assert figures["machine"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert figures["rows"]
    assert all(row["name"] in shown for row in figures["rows"])
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(SETTINGS, "small", replace(QUICK, steps=1))
    assert command.main(arguments) == 1
    assert "runs of another setting" in capsys.readouterr().err


def test_the_sizes_are_models_with_all_their_parts():
    for setting in (SMALL, *SETTINGS.values()):
        config = setting.config
        assert config.num_nextn_predict_layers == 1
        assert config.num_hidden_layers > config.first_k_dense_replace
        assert config.n_routed_experts > config.num_experts_per_tok
        assert setting.length <= config.original_max_position_embeddings
