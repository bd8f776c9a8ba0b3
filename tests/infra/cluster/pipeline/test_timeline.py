"""The picture of a timeline: what is drawn where, read back from the SVG and from the pixels."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from infra.cluster.pipeline.replay import Timeline, replay
from infra.cluster.pipeline.timeline import COLOURS, GAP, LEFT, RIGHT, ROW, TOP, nice, png, svg
from infra.cluster.pipeline.times import Duration, StageTimes
from infra.errors import ConfigError
from infra.parallel.schedules import build

NAMESPACE = "{http://www.w3.org/2000/svg}"
WIDTH = 1400


def run(name: str, stages: int, micro_batches: int) -> Timeline:
    return replay(build(name, stages, micro_batches), StageTimes.uniform(stages, 1, 1, 1, pair=3))


def rows(document: str) -> list[list[dict]]:
    """Of every rank its steps: title, boxes (class, left, width, height) and numbers."""
    found = []
    for row in ElementTree.fromstring(document).findall(f"{NAMESPACE}g"):
        steps = []
        for step in row.findall(f"{NAMESPACE}g"):
            boxes = []
            for path in step.findall(f"{NAMESPACE}path"):
                left, top, wide, high = re.fullmatch(
                    r"M(\S+) (\S+)h(\S+)v(\S+)h-\S+z", path.get("d")
                ).groups()
                boxes.append((path.get("class"), float(left), float(top), float(wide), float(high)))
            numbers = [text.text for text in step.findall(f"{NAMESPACE}text")]
            steps.append({"title": step.find(f"{NAMESPACE}title").text, "boxes": boxes, "numbers": numbers})
        found.append(steps)
    return found


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_every_step_has_its_boxes_and_idle_time_shows(name):
    timeline = run(name, 8, 20)
    drawn = rows(svg(timeline, WIDTH))
    assert [len(row) for row in drawn] == [len(row) for row in timeline.rows]
    scale = (WIDTH - LEFT - RIGHT) / timeline.makespan
    for row, events in zip(drawn, timeline.rows, strict=True):
        end = 0
        for step, event in zip(row, events, strict=True):
            _, left, _, wide, _ = step["boxes"][0]
            assert left == pytest.approx(event.start * scale, abs=0.01)
            assert end <= left + 0.011
            assert wide == pytest.approx(event.seconds * scale, abs=1)
            assert sum(box[4] for box in step["boxes"]) == ROW
            end = left + wide
        assert end <= WIDTH - LEFT - RIGHT


def test_a_pair_is_a_forward_above_a_backward_of_the_other_direction():
    first = next(step for step in rows(svg(run("dualpipe", 8, 20)))[0] if len(step["boxes"]) == 2)
    assert first["title"] == "F&B forward of 7, stage 0; backward of 13, stage 7: 17 s to 20 s"
    assert [(box[0], box[2]) for box in first["boxes"]] == [("f", 0), ("b2", ROW / 2)]
    assert first["numbers"] == ["7", "13"]


def test_numbers_are_drawn_where_all_of_a_width_fit():
    wide, narrow = (rows(svg(run("1f1b", 4, 120), width)) for width in (9000, 1400))
    assert [step["numbers"] for step in wide[3]][:4] == [["0"], ["0"], ["1"], ["1"]]
    assert not any(step["numbers"] for row in narrow for step in row)


def test_the_headline_and_legend_say_what_is_there():
    text = svg(run("zb1p", 4, 8), unit="ms")
    assert "zb1p: 4 stages on 4 ranks, 8 micro-batches, 27 ms, 11.1% idle" in text
    assert "backward for weights" in text
    assert "overlapped" not in text
    assert ">entered at rank 7<" in svg(run("dualpipe", 8, 20))
    assert ">on the way back<" in svg(run("dualpipev", 8, 20))


def test_what_is_given_is_escaped():
    text = svg(run("1f1b", 2, 2), unit='<"&', title="<script>alert(1)</script>")
    assert "<script" not in text
    assert "&lt;script&gt;" in ElementTree.tostring(ElementTree.fromstring(text), encoding="unicode")


def test_exposed_communication_is_told():
    times = StageTimes((Duration(0.5, 0.125),), backward=(Duration(1),))
    assert "F 0, stage 0: 0 s to 0.5 s, 0.125 s exposed" in svg(replay(build("1f1b", 1, 1), times))


def test_a_training_step_is_less_than_a_megabyte():
    assert 200_000 < len(svg(run("dualpipe", 16, 120)).encode()) < 1_000_000


def test_the_pixels_are_those_of_the_boxes(tmp_path):
    """Next to the corner of chosen steps of rank 0 and of the last, and in the idle time between."""
    image = pytest.importorskip("matplotlib.image")
    timeline, path = run("dualpipe", 4, 8), tmp_path / "timeline.png"
    png(timeline, path, WIDTH, title="costs $5 or $6", scale=1)
    pixels = (image.imread(path)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[1] == WIDTH
    scale = (WIDTH - LEFT - RIGHT) / timeline.makespan

    def colour(rank: int, seconds: float, down: float) -> str:
        y, x = round(TOP + rank * (ROW + GAP) + down * ROW), round(LEFT + seconds * scale) + 3
        return "#" + "".join(f"{value:02x}" for value in pixels[y, x])

    for rank in (0, 3):
        for event in timeline.rows[rank]:
            for box, down in ((0, 0.15), (-1, 0.85)):
                step = event.step
                part = (step.forward, step.backward)[box] if hasattr(step, "forward") else step
                assert colour(rank, event.start, down) == COLOURS[part.kind][part.micro >= 4][0]
    gap = next(
        before.end
        for before, after in zip(timeline.rows[0], timeline.rows[0][1:], strict=False)
        if after.start > before.end
    )
    assert colour(0, gap, 0.5) not in {shade[0] for shades in COLOURS.values() for shade in shades}


@pytest.mark.parametrize(
    ("least", "step"), [(1, 1), (1.01, 2), (0.03, 0.05), (0.051, 0.1), (700, 1000), (5, 5)]
)
def test_ticks_are_round(least, step):
    assert nice(least) == pytest.approx(step)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="width: 100 pixels leave no room; use 220 or more"):
        svg(run("1f1b", 2, 2), width=100)
    with pytest.raises(ConfigError, match="nothing in it takes any time"):
        svg(replay(build("1f1b", 2, 2), StageTimes.uniform(2, 0, 0, 0)))
