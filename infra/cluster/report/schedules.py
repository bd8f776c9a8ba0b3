"""Chapter: the pipeline methods of the report's table 2, each replayed."""

from __future__ import annotations

from infra.cluster.pipeline.replay import Timeline, replay
from infra.cluster.pipeline.times import StageTimes
from infra.cluster.report.chapter import Chapter, beside
from infra.parallel.schedules import build
from kernels.figures import Row

STAGES = (4, 8, 16)
FORWARD, INPUTS, WEIGHTS, PAIR = 1, 1, 1, 3
"""Whole units, as the table counts: a backward pass is two, an overlapped pair three."""


def table_two(method: str, stages: int) -> tuple[float, int, float]:
    """Bubble, live activations and stages of parameters a device that are published for a method.

    Of three the report's table 2; of DualPipeV, which is not in it, the table of DualPipe's repository, which
    gives it DualPipe's figures for the same stages on half the devices.
    """
    backward = INPUTS + WEIGHTS
    if method == "1f1b":
        return (stages - 1) * (FORWARD + backward), stages, 1.0
    if method == "zb1p":
        return (stages - 1) * (FORWARD + backward - 2 * WEIGHTS), stages, 1.0
    return (stages // 2 - 1) * (PAIR + backward - 3 * WEIGHTS), stages + 1, 2.0


def replayed_method(method: str, stages: int) -> Timeline:
    """The method on unit times. DualPipeV lays as many stages on half the devices."""
    micro = 5 * stages // 2 * 2
    return replay(
        build(method, stages, micro), StageTimes.uniform(stages, FORWARD, INPUTS, WEIGHTS, pair=PAIR)
    )


def schedules_chapter() -> Chapter:
    """Table 2 from replayed schedules, at 4, 8 and 16 stages."""
    rows: list[Row] = []
    for method in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        for stages in STAGES:
            timeline = replayed_method(method, stages)
            bubble, live, copies = table_two(method, stages)
            schedule = timeline.schedule
            which = f"{method}, as dualpipe in its repository" if method == "dualpipev" else method
            name = f"{which}, {stages} stages on {schedule.ranks} devices"
            for what, unit, ours, theirs in (
                ("bubble", "units", max(timeline.bubbles), bubble),
                ("live activations", "chunks", max(timeline.live), live),
                ("parameters", "stages a device", max(map(len, schedule.held)), copies),
            ):
                rows.append(beside(f"{name}: {what}", unit, ours, theirs, 0.0, must=True))
    return Chapter(
        "Pipeline schedules (report, table 2)",
        tuple(rows),
        notes=(
            "Each schedule is a list of actions for every rank, the same that an executor runs; bubbles and "
            "activations come out of replaying it with F = 1, B = 2, W = 1 and F&B = 3, those of the fullest "
            "rank. DualPipeV is not in the report's table: its figures are DualPipe's for the same stages, "
            "on half the devices, as DualPipe's repository says.",
        ),
    )
