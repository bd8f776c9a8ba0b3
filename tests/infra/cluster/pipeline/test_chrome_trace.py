"""Timelines through a Chrome trace and back; annotations of a training run; what is no trace is refused."""

import gzip
import json
from fractions import Fraction

import pytest

from infra.cluster.pipeline.chrome_trace import TraceError, read_events, read_times, write
from infra.cluster.pipeline.replay import replay
from infra.cluster.pipeline.timeline import png
from infra.cluster.pipeline.times import Duration, StageTimes
from infra.errors import HeadwaterError
from infra.parallel.actions import Action, Pair
from infra.parallel.schedules import METHODS, build


def trace(path, *events):
    path.write_text(json.dumps({"traceEvents": list(events)}))
    return path


def span(name, start, micros, cat="user_annotation", **args):
    return {"ph": "X", "name": name, "cat": cat, "pid": 1, "tid": 1, "ts": start, "dur": micros, "args": args}


def test_what_is_written(tmp_path):
    """The first steps of two ranks, by hand: F=1 ms, I=2 ms, W=1 ms."""
    path = tmp_path / "trace.json"
    times = StageTimes.uniform(2, 0.001, 0.002, 0.001)
    write(replay(build("1f1b", 2, 2), times), path)
    document = json.loads(path.read_text())
    names = {event["tid"]: event["args"]["name"] for event in document["traceEvents"]
             if event["name"] == "thread_name"}  # fmt: skip
    assert names == {1: "rank 0", 2: "rank 1"}
    steps = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(steps) == 8
    assert all(event["pid"] == 1 and event["tid"] in names for event in steps)
    last = next(event for event in steps if event["tid"] == 2 and event["name"] == "B")
    assert last["args"] == {"stage": 1, "micro": 0}
    assert (last["ts"], last["dur"]) == (pytest.approx(2000), pytest.approx(3000))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_durations_come_back_and_replay_alike(tmp_path, name):
    """Every stage has its own; what comes back replays to the same ends."""
    stages, path = 4, tmp_path / "trace.json"
    forward, inputs, weights = (
        tuple(Duration(Fraction(part + stage, 64), Fraction(stage, 128)) for stage in range(stages))
        for part in (8, 9, 7)
    )
    pairs = {
        (i, j): Duration(Fraction(20 + i + 2 * j, 64), Fraction(1, 64)) for i in range(4) for j in range(4)
    }
    schedule = build(name, stages, 12)
    made = replay(schedule, StageTimes(forward, inputs, weights, pairs=pairs))
    write(made, path)
    times = read_times(path)
    again = replay(schedule, times)
    assert again.makespan == pytest.approx(float(made.makespan))
    assert sum(again.exposed) == pytest.approx(float(sum(made.exposed)))
    assert bool(times.pairs) == name.startswith("dualpipe")
    assert bool(times.inputs) == (name != "1f1b")


def test_the_median_of_a_stage_over_ranks_and_steps(tmp_path):
    """Names alone, or names with arguments; whatever else is in the trace is passed over."""
    first = trace(
        tmp_path / "rank0.json",
        span("F", 0, 5, stage=0, micro=0),
        span("F stage=0 micro=1", 10, 7),
        span("F", 20, 900, stage=0, micro=2),
        span("B stage=0 micro=0", 30, 4),
        span("optimizer", 40, 1),
        {"ph": "M", "name": "thread_name", "args": {"name": "F"}},
    )
    second = trace(
        tmp_path / "rank1.json",
        span(str(Action("F", 1, 0)), 0, 3),
        span(str(Action("I", 1, 0)), 0, 2),
        span(str(Action("W", 1, 0)), 0, 9),
        span(str(Pair(Action("F", 1, 1), Action("B", 0, 1))), 0, 30, exposed_us=6),
    )
    times = read_times([first, second])
    assert times.forward == (Duration(7 / 1e6), Duration(3 / 1e6))
    assert times.backward == (Duration(4 / 1e6), Duration(2 / 1e6) + Duration(9 / 1e6))
    assert times.pairs == {(1, 0): Duration(30 / 1e6, 6 / 1e6)}
    assert times.inputs == ()


def test_when_the_kernels_ran_counts_and_not_when_they_were_launched(tmp_path):
    """One annotation has a span a stream, by one id: 100 to 130 and 120 to 150 are 50 us."""
    device = {"cat": "gpu_user_annotation", "stage": 0, "micro": 0}
    path = trace(
        tmp_path / "t.json",
        span("F", 0, 1, stage=0, micro=0),
        span("F", 100, 30, **device, **{"External id": 7}),
        span("F", 120, 30, **device, **{"External id": 7}),
        span("F", 200, 60, **device, **{"External id": 8}),
        span("F", 300, 40, **device, **{"External id": 9}),
        span("B", 400, 20, **device, **{"External id": 10}),
    )
    assert read_times(path).forward == (Duration(50 / 1e6),)


def test_annotations_of_the_profiler_are_read(tmp_path):
    """The real one, on a CPU."""
    import torch

    path = tmp_path / "trace.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for micro in range(3):
            for kind in "FB":
                with torch.profiler.record_function(str(Action(kind, 0, micro))):
                    torch.ones(4).sum()
    profiler.export_chrome_trace(str(path))
    times = read_times(path)
    assert times.stages == 1
    assert 0 < times.forward[0].seconds < 10


def test_gzipped_and_bare_lists_are_traces_too(tmp_path):
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps([span("F", 0, 5, stage=0)]).encode()))
    assert read_events(path)[0]["dur"] == 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("\x1f", "is not JSON"),
        ("3", "has no list `traceEvents`"),
        ('{"traceEvents": 3}', "has no list `traceEvents`"),
        ("{}", "has no list `traceEvents`"),
        ("[]", "holds no complete events"),
        ('{"traceEvents": [4, {"ph": "M"}]}', "holds no complete events"),
        ('[{"ph": "X", "name": "F", "ts": 3, "dur": -2}]', "event 'F' at 3 lasts -2 us"),
        ('[{"ph": "X", "name": "F", "ts": 3}]', "event 'F' has dur None"),
        ('[{"ph": "X", "name": "F", "ts": "3", "dur": 2}]', "event 'F' has ts '3'"),
        ('[{"ph": "X", "name": "F", "ts": NaN, "dur": 2}]', "event 'F' has ts nan"),
        ('[{"ph": "X", "name": "sgd", "ts": 3, "dur": 2}]', "no event is named F, B, I, W or F&B"),
        ('[{"ph": "X", "name": "F", "ts": 3, "dur": 2}]', "event 'F' at 3 names no stage"),
        ('[{"ph": "X", "name": "F", "args": 4, "ts": 3, "dur": 2}]', "event 'F' at 3 names no stage"),
        ('[{"ph": "X", "name": "F stage=0", "ts": 3, "dur": 2}]', "no B of stage 0 of 1"),
        ('[{"ph": "X", "name": "F stage=999999999999", "ts": 3, "dur": 2}]', "no F of stage 0 of"),
        ('[{"ph": "X", "name": "B stage=1", "ts": 3, "dur": 2}]', "no F of stage 0 of 2"),
        (
            '[{"ph": "X", "name": "F&B stage=1", "ts": 3, "dur": 2}]',
            "names no stage and backward_stage",
        ),
        (
            '[{"ph": "X", "name": "F", "ts": 3, "dur": 2, "args": {"stage": 0, "exposed_us": "1"}}]',
            "has exposed_us '1'",
        ),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TraceError) as refused:
        read_times(path)
    assert str(path) in str(refused.value)
    assert says in str(refused.value)


def test_a_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "broken.json.gz"
    whole = gzip.compress(b"[]")
    for content in (whole[:-4], whole[:12] + b"xyz" + whole[12:]):
        path.write_bytes(content)
        with pytest.raises(TraceError, match="cannot be read"):
            read_times(path)


def test_no_file_is_refused():
    with pytest.raises(TraceError, match="no file was given"):
        read_times([])


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Missing folders are made; where a file cannot be written the old one stays, and the error names it."""
    timeline = replay(build("1f1b", 2, 4), StageTimes.uniform(2, 1, 1, 1, pair=3))
    pytest.importorskip("matplotlib")
    for name, make in (("step.json", write), ("step.png", png)):
        path = tmp_path / "a" / "b" / name
        make(timeline, path)
        before = path.read_bytes()
        assert [one.name for one in path.parent.iterdir()] == [name]

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("infra.files.os.replace", full)
            with pytest.raises(HeadwaterError, match=rf"{name}: cannot be written: No space left"):
                make(timeline, path)
        assert path.read_bytes() == before
        assert [one.name for one in path.parent.iterdir()] == [name]
        with pytest.raises(HeadwaterError, match=f"{name}/under"):
            make(timeline, path / "under")
        path.unlink()
