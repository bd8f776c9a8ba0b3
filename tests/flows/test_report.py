"""The report: figures from records, drawn safely whatever an artifact says."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import report, report_page
from flows.finish import finish
from flows.gain import gains
from flows.report import Curve, Report, Row, Sample, gather, read_jsonl
from flows.report_page import duration, number, render
from flows.terminal import Terminal, print_report, sparkline
from infra.artifact import Artifact
from infra.errors import DiskFull, StoreError
from infra.record import FileEntry, InputRef
from infra.store import Store

Toy = Callable[..., Any]
EVIL = "<script>alert('x')</script>\" onload='y' [bold]&amp;"
PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f\x15\xc4\x89"
)


class Page(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


def evil(tmp_path: Path) -> Report:
    """A report in which everything that comes from outside is hostile."""
    return Report(
        run=EVIL,
        preset=EVIL,
        description=EVIL,
        made="2026-01-01T00:00:00",
        seconds=61.0,
        home=tmp_path,
        rows=(Row(EVIL, EVIL, "failed", None, 1.0, {EVIL: EVIL, "score": 0.5}, EVIL),),
        curves=(Curve(EVIL, "loss", "step", ((1.0, 2.0), (2.0, 1.0))),),
        samples=(Sample(EVIL, EVIL, EVIL, EVIL, EVIL, False),),
        gates=(
            {"name": EVIL, "formula": EVIL, "value": None, "bound": EVIL, "holds": False, "problem": EVIL},
        ),
        promotion=EVIL,
        tree=EVIL,
        gains=(EVIL,),
    )


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    text = render(evil(tmp_path))
    page = Page(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert") > 10, "it is shown as the text it is"
    assert "default-src 'none'" in text


def test_the_page_needs_nothing_else(quick: Toy, store: Store) -> None:
    result, _ = quick()
    made = finish(store, result)
    text = made.page.read_text()
    assert made.page == store.home / "reports" / "toy" / "report.html"
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    page = Page(text)
    for outcome in result.outcomes.values():
        assert outcome.artifact.ref in page.text
        assert outcome.node in page.text
    assert "training helps" in page.text
    assert "0.5" in page.text


def test_plots_and_samples_are_taken_from_the_artifacts(quick: Toy, store: Store) -> None:
    result, _ = quick()
    finish(store, result)
    artifact = result.outcomes["train"].artifact
    (artifact.path / "plots").mkdir()
    (artifact.path / "plots" / "curve.png").write_bytes(PIXEL)
    (artifact.path / "samples.json").write_text(
        json.dumps(
            [{"prompt": "2+2", "system": "", "answer": "<think>x</think>4", "expected": "4", "correct": True}]
        )
    )
    listed = dataclasses.replace(
        artifact.record,
        stage="evaluate",
        files=(*artifact.record.files, report_entry("samples.json")),
        side_files=(*artifact.record.side_files, report_entry("plots/curve.png")),
    )
    changed = dataclasses.replace(artifact, record=listed)
    made = gather(store, "toy")
    rows = tuple(
        dataclasses.replace(row, artifact=changed) if row.node == "train" else row for row in made.rows
    )
    samples = tuple(report._samples("train", changed))
    text = render(dataclasses.replace(made, rows=rows, samples=samples))
    assert "data:image/png;base64,iVBORw0KGgo" in text
    assert "&lt;think&gt;x&lt;/think&gt;4" in text
    assert samples[0].correct


SCORES = {"pass_at_1": 0.4, "pass_at_1_system": 0.9, "reasoned": 0.25, "format": 1.0}


def made(artifact: Artifact, stage: str, id: str, reads: dict[str, str], **metrics: float) -> Artifact:
    """An artifact of a stage that read others in the given roles, with these figures in its record."""
    inputs = tuple(InputRef(role, *ref.split("@"), ref, "") for role, ref in reads.items())
    # A later attempt, `id-2`, came out with the same bytes.
    digest = f"{stage}@{id.partition('-')[0]}"
    changed = {"stage": stage, "id": id, "digest": digest, "inputs": inputs, "metrics": metrics}
    return dataclasses.replace(artifact, record=dataclasses.replace(artifact.record, **changed))


def scored(artifact: Artifact, id: str, checkpoint: str, **metrics: float) -> Artifact:
    reads = {"checkpoint": checkpoint, "problems": "tasks@1"}
    return made(artifact, "evaluate", id, reads, **{**SCORES, **metrics})


def reinforced(artifact: Artifact) -> list[Artifact]:
    """What a run with reinforcement learning and its control leaves, as far as it matters here."""
    return [
        made(artifact, "sft", "first", {"base": "extend@1"}, token_passes=5.0),
        made(artifact, "grpo", "rl", {"policy": "sft@first", "reward": "reward@judge"}, token_passes=70.0),
        made(artifact, "sft", "more", {"base": "sft@first"}, token_passes=100.0),
        scored(artifact, "a", "sft@first", pass_at_1_sorting=0.3),
        scored(artifact, "b", "grpo@rl", pass_at_1=0.85, reasoned=0.955, pass_at_1_sorting=0.7),
        scored(artifact, "c", "sft@more", pass_at_1=0.5),
    ]


def test_what_reinforcement_learning_brought_is_told_from_the_records(quick: Toy, store: Store) -> None:
    result, _ = quick(stop=("left",))
    artifact = result.outcomes["left"].artifact
    # What the reward model cost is part of what reinforcement learning cost.
    judge = made(artifact, "reward", "judge", {"policy": "sft@first"}, token_passes=10.0)
    listed = [*reinforced(artifact), judge]
    (told,) = gains(reversed(listed))
    assert "the SFT model reasons in 25.0% of answers and is right in 40.0% (with the prompt 90.0%)" in told
    assert "after GRPO it reasons unasked in 95.5% and is right in 85.0%" in told
    assert "at 1.25 times the extra compute (passes over a token), gives 50.0%" in told
    assert "By family, before and after GRPO: sorting 30.0% to 70.0%" in told
    # A second attempt with the same bytes was evaluated with the first.
    again = made(
        artifact, "grpo", "rl-2", {"policy": "sft@first", "reward": "reward@judge"}, token_passes=70.0
    )
    assert gains([one for one in listed if one.stage != "grpo"] + [again]) == (told,)
    shown = dataclasses.replace(finish(store, result), gains=(told,))
    out = io.StringIO()
    print_report(shown, Console(file=out, width=1000))
    assert told in out.getvalue()
    assert f"<p>{told}</p>" in render(shown)


def test_nothing_is_told_that_was_not_compared_like_with_like(quick: Toy) -> None:
    result, _ = quick(stop=("left",))
    artifact = result.outcomes["left"].artifact
    listed = reinforced(artifact)
    for left_out in range(len(listed)):
        assert gains(listed[:left_out] + listed[left_out + 1 :]) == (), listed[left_out].ref
    elsewhere = {"checkpoint": "sft@more", "problems": "tasks@2"}
    assert gains([*listed[:-1], made(artifact, "evaluate", "c", elsewhere, **SCORES)]) == ()
    from_other = made(artifact, "sft", "more", {"base": "sft@other"}, token_passes=100.0)
    assert gains([*listed[:2], from_other, *listed[3:]]) == ()


def report_entry(path: str) -> Any:
    """A file as a record lists it."""
    return FileEntry(path, 1, "0" * 64)


def test_the_terminal_shows_hostile_text_as_text(tmp_path: Path) -> None:
    out = io.StringIO()
    print_report(evil(tmp_path), Console(file=out, width=200, highlight=False))
    assert "[bold]" in out.getvalue()
    assert "FAILS" in out.getvalue()


def test_the_terminal_prints_a_line_an_event() -> None:
    out = io.StringIO()
    with Terminal(out) as terminal:
        terminal.listen(
            "train",
            {"event": "start", "stage": "slow", "why": ["a (nearest earlier: x)", "b (nearest earlier: x)"]},
        )
        terminal.listen("train", {"event": "log", "message": "building slow: a (nearest earlier: x)"})
        terminal.listen("train", {"event": "log", "level": "warning", "message": "[red]careful"})
        terminal.listen("train", {"event": "progress", "done": 1, "total": 4, "loss": 2.5})
        terminal.listen("train", {"event": "progress", "done": 2, "total": 4, "loss": 2.0})
        terminal.listen("train", {"event": "done", "status": "built", "seconds": 3.0})
        terminal.listen("next", {"event": "cached", "ref": "slow@1"})
        terminal.listen("last", {"event": "failed", "message": "no"})
        terminal.listen("rest", {"event": "skipped"})
    lines = [line[10:] for line in out.getvalue().splitlines()]
    assert lines == [
        "train     building a; b (unlike x)",
        "train     [red]careful",
        "train     25% loss 2.5",
        "train     built 3.0 s",
        "next      cached slow@1",
        "last      failed no",
        "rest      skipped",
    ]


def test_a_stage_chooses_the_figures_of_its_row(quick: Toy, store: Store) -> None:
    result, _ = quick()
    rows = {row.node: row for row in finish(store, result).rows}
    assert rows["train"].figures == {"total": result.outcomes["train"].artifact.metrics["total"]}
    assert rows["left"].figures == {"count": 3}


def test_a_run_of_a_part_is_not_judged_by_what_it_left_out(quick: Toy, store: Store) -> None:
    result, _ = quick(stop=("control",))
    made = finish(store, result)
    assert made.gates == ()
    assert made.promotion == ""
    assert [row.node for row in made.rows] == ["left", "control"]


def test_rows_of_an_earlier_run_are_marked(quick: Toy, store: Store) -> None:
    whole, _ = quick()
    last = whole.outcomes["last"].artifact.ref
    finish(store, whole)
    part, _ = quick("left.count=4", stop=("control",))
    found = finish(store, part)
    assert {row.node: row.status for row in found.rows} == {
        "left": "built",
        "right": "earlier run",
        "train": "earlier run",
        "control": "built",
        "last": "earlier run",
    }
    assert last not in found.tree, "the lineage is of what this run made"
    assert "earlier run" in Page(render(found)).text


def test_a_report_on_an_unknown_run_says_which_there_are(quick: Toy, store: Store) -> None:
    quick(stop=("left",))
    with pytest.raises(StoreError, match=r"no run is called 'tooy'.*toy"):
        gather(store, "tooy")


def test_torn_lines_in_a_log_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n[1]\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_sparklines_numbers_and_times() -> None:
    assert sparkline([4, 3, 2, 1], 4) == "█▆▃▁"
    assert sparkline([1, 1, 1], 2) == "▁▁"
    assert sparkline([], 5) == ""
    assert sparkline(list(range(100)), 8) == "▁▂▃▄▅▆▇█"
    assert [number(value) for value in (3.14159, 1234567, 2.0, True, "x")] == [
        "3.142",
        "1,234,567",
        "2",
        "True",
        "x",
    ]
    assert [duration(s) for s in (0.04, 99.0, 125.0, 7300.0)] == [
        "0.0 s",
        "99.0 s",
        "2 min 05 s",
        "2 h 01 min",
    ]
    assert report_page.label("pass_at_1") == "pass at 1"


def test_a_page_that_cannot_be_written_costs_a_warning(
    quick: Toy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = quick()

    def full(path: Path, text: str, points: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report_page, "atomic_write_text", full)
    made = finish(store, result)
    assert "No space left on device" in made.unwritten
    assert "`headwater report toy` writes it" in made.unwritten
    out = io.StringIO()
    print_report(made, Console(file=out, width=1000))
    assert made.unwritten in out.getvalue()
    assert "report  /" not in out.getvalue()


def test_a_run_that_cannot_be_noted_is_reported_all_the_same(
    quick: Toy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = quick()

    def full(*given: Any, **more: Any) -> None:
        raise DiskFull("no space left while writing names/")

    monkeypatch.setattr(type(store.names), "describe_run", full)
    monkeypatch.setattr(type(store.names), "promote", full)
    made = finish(store, result)
    assert [gate["holds"] for gate in made.gates] == [True]
    assert made.promotion == "not promoted to answer: no space left while writing names/"
