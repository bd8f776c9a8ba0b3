"""`headwater plan`, through the command line in this process; and runs of many GPUs, which are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import application
from flows.command_run import Request, perform
from flows.planning import planned
from flows.preset import load, shipped
from flows.runner import Options, Pipeline
from infra.cluster.pipeline.chrome_trace import read_times
from infra.config import ModelStageConfig
from infra.errors import ConfigError, HeadwaterError
from infra.store import Store
from tests.flows.conftest import environment
from tests.flows.test_preset import TOY

Capture = pytest.CaptureFixture[str]
Plan = Callable[..., str]


@pytest.fixture
def plan(capsys: Capture) -> Plan:
    """Run `headwater plan` and return what it prints."""

    def run(*arguments: str) -> str:
        application()(["plan", *arguments], standalone_mode=False)
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    return run


SMALL = ("--preset", "smoke", "--gpus", "2", "--set", "cluster.pipeline=2")
"""Two stages, two micro-batches."""


# What it says


@pytest.mark.parametrize("name", shipped())
def test_every_preset_that_ships_can_be_planned(plan: Plan, name: str) -> None:
    text = plan("--preset", name)
    assert text.startswith(f"Plan of {name}: ")
    for title in ("In short", "Model", "One step", "Cost", "Memory", "Network"):
        assert f"\n{title}\n{'-' * len(title)}\n" in text
    rows = json.loads(plan("--preset", name, "--json"))["rows"]
    assert len(rows) > 30


def test_the_reports_run_is_the_one_that_is_planned_by_default(plan: Plan) -> None:
    text = plan()
    assert text.startswith("Plan of v3: DeepSeek-V3 ")
    assert "2,048 x h800" in text
    assert "671,026,419,200" in text
    assert "the last: one layer" in text


def test_the_reports_run_is_laid_out_as_the_report_says() -> None:
    made = planned(load("v3"))
    assert made.request.published_run
    assert [len(each.step.layout.layers) for each in made.phases] == [0, 0, 0]
    assert [each.problem for each in made.phases] == ["", "", ""]
    phases = [each.phase for each in made.phases]
    assert [(phase.name, phase.tokens, phase.length, phase.global_batch) for phase in phases] == [
        ("pretraining", 14.8e12, 4096, 15360),
        ("extend_32k", 62_914_560_000, 32768, 1920),
        ("extend_128k", 62_914_560_000, 131072, 480),
    ]
    assert made.fit.fits
    assert (made.request.prefill.gpus, made.request.decode.gpus) == (32, 320)


def test_what_a_preset_trains_with_is_what_is_planned() -> None:
    made = planned(
        load("smoke", ["pretrain.micro_rows=2", "pretrain.precision=bf16", "pretrain.batch_rows=6"])
    )
    node = load("smoke").nodes["pretrain"].config
    layout = made.step.layout
    assert (layout.micro_batch, layout.global_batch, layout.precision) == (2, 6, "bf16")
    assert made.request.shape == node.model
    assert made.phases[0].phase.tokens == node.tokens
    assert layout.length == load("smoke").nodes["pack"].config.sequence_length
    assert layout.recompute == frozenset()
    made = planned(load("smoke", ["pretrain.recompute=true"]))
    assert made.step.layout.recompute == {"norms", "swiglu", "mla_up"}


def test_settings_of_the_cluster(plan: Plan, tmp_path: Path) -> None:
    for name in ("my: box", "a #1 [x] {y}", 'it\'s "mine"', "über"):
        described = tmp_path / f"{name}.json"
        described.write_text(json.dumps({"like": "h200", "nvlink": 1e11}))
        found = json.loads(plan(*SMALL, "--machine", str(described), "--json"))
        assert found["machine"]["name"] == name
        assert found["machine"]["nvlink"] == 1e11
    dear, cheap = (
        planned(load("smoke", [f"cluster.price={price}", "cluster.zero=0"])).request.price
        for price in (4.0, 1.0)
    )
    assert (dear, cheap) == (4.0, 1.0)
    text = plan(*SMALL, "--set", "cluster.price=4", "--set", "cluster.schedule=zb1p")
    assert "At 4 dollars a GPU-hour" in text


def test_serving_is_planned_where_it_is_asked_for(plan: Plan) -> None:
    assert "Decoding, roofline" not in plan("--preset", "smoke")
    text = plan("--preset", "smoke", "--set", "cluster.decode={gpus: 1, slots: 4}")
    assert "Decoding, roofline" in text


# How it says it


def test_json_in_the_one_form(plan: Plan, tmp_path: Path) -> None:
    found = json.loads(plan(*SMALL, "--json"))
    assert set(found) == {"machine", "layout", "rows", "tables", "notes"}
    assert (found["layout"]["gpus"], found["layout"]["pipeline"]) == (2, 2)
    assert found["rows"][0] == {
        **dict.fromkeys(("peer", "peer_name", "ratio", "goal", "published", "holds")),
        **{"name": "In short: GPUs", "unit": "GPUs", "ours": 2},
    }
    path = tmp_path / "plan.json"
    assert plan(*SMALL, "--json", "-o", str(path)) == f"{path}\n"
    assert json.loads(path.read_text()) == found


def test_html_as_one_page(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.html"
    assert plan(*SMALL, "--html", "-o", str(path)) == f"{path}\n"
    page = path.read_text()
    assert page.startswith("<!doctype html>")
    assert "<h1>Plan of smoke</h1>" in page
    assert "<svg" in page
    assert plan(*SMALL, "--html") == page


def test_the_timeline_as_a_chrome_trace(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    plan(*SMALL, "--trace", str(path))
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    # Two micro-batches, forward and back, on each of two ranks.
    assert len(steps) == 8
    assert {event["name"] for event in steps} == {"F", "B"}
    assert all(event["ts"] >= 0 and event["dur"] > 0 and event["pid"] == 1 for event in steps)
    for track in {event["tid"] for event in steps}:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in steps if e["tid"] == track)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(spans))
    named = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert named == {"rank 0", "rank 1"}


def test_a_trace_of_durations_is_replayed(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    wanted = plan(*SMALL, "--trace", str(path), "--json")
    found = plan(*SMALL, "--durations", str(path), "--json")
    assert read_times([path]).stages == 2

    def step(text: str) -> float:
        (row,) = (row for row in json.loads(text)["rows"] if row["name"] == "One step: step")
        return float(row["ours"])

    assert step(found) == pytest.approx(step(wanted), rel=1e-6)
    # What comes of a trace is never called a prediction.
    told = json.loads(found)
    (bill,) = (table for table in told["tables"] if table["title"] == "With the trace's durations")
    assert {line[0]: line[-1] for line in bill["rows"]}["pretraining"] == "replayed"
    totals = [row["name"] for row in told["rows"] if ": all phases (" in row["name"]]
    assert len(totals) == 2
    assert all(name.startswith("Cost: with the trace's durations: ") for name in totals)
    assert all("(replayed" in name or "+ replayed" in name for name in totals)
    assert not [name for name in totals if "predicted:" in name]
    assert "Predicted" not in {table["title"] for table in told["tables"]}


def test_the_timeline_as_a_picture(plan: Plan, tmp_path: Path) -> None:
    plan(*SMALL, "--picture", str(tmp_path / "step.svg"))
    assert (tmp_path / "step.svg").read_text().startswith("<svg xmlns=")
    plan(*SMALL, "--picture", str(tmp_path / "step.png"))
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_for_layouts(plan: Plan) -> None:
    found = json.loads(plan(*SMALL, "--set", "pretrain.batch_rows=16", "--search", "--json"))
    (fitting,) = (table for table in found["tables"] if table["title"] == "The fastest that fit")
    seconds = fitting["head"].index("step, s")
    times = [line[seconds] for line in fitting["rows"]]
    assert len(times) > 2
    assert times == sorted(times)
    assert fitting["head"][:4] == ["PP", "EP", "DP", "schedule"]
    assert all("bubble" in line[-1] for line in fitting["rows"])
    assert "The fastest that fit" in plan(*SMALL, "--set", "pretrain.batch_rows=16", "--search")


# What it refuses


REFUSED = {
    "PP": (["--set", "cluster.pipeline=15"], r"cluster\.pipeline is 15: .* nearest that fits is 16"),
    "EP": (["--set", "cluster.expert=48"], r"cluster\.expert is 48: .* nearest that fits is 32"),
    "ZeRO": (["--set", "cluster.zero=4"], r"cluster\.zero: .*4"),
    "schedule": (["--set", "cluster.schedule=gpipe"], r"cluster\.schedule: .*dualpipe"),
    "recompute": (["--set", "cluster.recompute=[norm]"], r"cluster\.recompute is .*norm is unknown.* norms"),
    "odd micro-batches": (
        ["--set", "pretrain.batch_rows=15488"],
        r"pretrain\.batch_rows is 15488: DualPipe wants an even number .* 121; .* fits is 15360",
    ),
    "too few micro-batches": (
        ["--set", "pretrain.batch_rows=2048"],
        r"pretrain\.batch_rows is 2048: .* at least 2 x pipeline = 32 .* 16; the nearest that fits is 4096",
    ),
    "batch": (
        ["--set", "pretrain.batch_rows=15361"],
        r"pretrain\.batch_rows is 15361: it does not divide .* nearest that fits is 15360",
    ),
    "GPUs": (["--gpus", "2040"], r"cluster\.pipeline is 16: 2040 GPUs do not divide"),
    "machine": (["--machine", "h801"], r"no machine is named 'h801'; did you mean h800"),
    "machine's file": (["--machine", "no.json"], r"no\.json: cannot read the machine"),
    "no number": (["--machine", "7"], r"no machine is named '7'"),
    "preset": (["--preset", "v4"], r"no preset named 'v4'"),
    "setting": (["--set", "cluster.piplene=2"], r"cluster\.piplene.*pipeline"),
    "search of a step": (["--search", "--trace", "x.json"], r"plan: --search plans no step"),
    "two forms": (["--json", "--html"], r"plan: give one of --json and --html"),
    "picture": (["--picture", "step.gif"], r"--picture step\.gif: name a \.svg or a \.png file"),
    "no pretraining": (["--preset", str(TOY)], r"has no node of stage pretrain: there is nothing to plan"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_what_to_set_and_the_nearest_that_fits(
    plan: Plan, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        plan(*arguments)
    assert "layout." not in str(refusal.value)
    fits = re.search(r"(\w+\.\w+) is .*the nearest that fits is (\d+)$", str(refusal.value))
    if fits:
        assert plan(*arguments, "--set", f"{fits[1]}={fits[2]}").startswith("Plan of ")


def test_shards_from_outside_have_no_known_length(tmp_path: Path) -> None:
    document = yaml.safe_load((Path(__file__).parents[2] / "flows/presets/v3.yaml").read_text())
    document["nodes"]["extend_32k"]["inputs"]["shards"] = "@elsewhere/pack"
    path = tmp_path / "outside.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError, match=r"preset v3: extend_32k reads shards from outside"):
        planned(load(str(path)))


def test_an_extension_that_cannot_run_is_told_and_the_rest_is_planned(plan: Plan) -> None:
    found = json.loads(plan("--set", "extend_128k.batch_rows=10", "--json"))
    told = [note["text"] for note in found["notes"] if "cannot run" in note["text"]]
    (problem,) = told
    wanted = r"extend_128k cannot run: extend_128k\.batch_rows is 10: .*nearest that fits is (\d+)\."
    nearest = re.fullmatch(wanted, problem)
    assert nearest is not None
    (uncounted,) = (note["text"] for note in found["notes"] if " is not counted: " in note["text"])
    assert uncounted == problem.replace("cannot run", "is not counted")
    (bill,) = (table for table in found["tables"] if table["title"] == "Predicted")
    assert [line[0] for line in bill["rows"]][:2] == ["pretraining", "extend_32k"]
    assert "layout." not in json.dumps(found["notes"])
    assert not any(row["published"] for row in found["rows"] if row["name"].startswith("One step"))
    made = planned(load("v3", [f"extend_128k.batch_rows={nearest[1]}"]))
    assert all(each.step for each in made.phases)


def test_a_node_in_part_can_be_planned() -> None:
    made = planned(load("smoke", ["cluster.gpus=12", "pretrain.batch_rows=48"]))
    assert made.step.layout.rank_gpus == 12


@pytest.mark.parametrize(
    ("sets", "changes"),
    [
        (
            ["pretrain.moments=fp32", "pretrain.micro_rows=2"],
            {"cluster.zero 1 -> 2", "pretrain.micro_rows 2 -> 1", "pretrain.moments fp32 -> bf16"},
        ),
        (["cluster.recompute=[norms]"], {"cluster.expert 64 -> 128", "cluster.recompute with full"}),
    ],
)
def test_levers_are_told_as_settings(plan: Plan, sets: list[str], changes: set[str]) -> None:
    overlays = [part for each in ["pretrain.precision=bf16", *sets] for part in ("--set", each)]
    found = json.loads(plan(*overlays, "--json"))
    (levers,) = (table for table in found["tables"] if table["title"] == "Single changes that free memory")
    named = {line[0] for line in levers["rows"]}
    assert changes <= named
    told = [note["text"] for note in found["notes"] if " frees most, " in note["text"]]
    assert told
    assert all(any(f". {change} frees most" in text for change in named) for text in told)
    assert "layout." not in json.dumps([found["tables"], found["notes"]])


@pytest.mark.parametrize("option", ["-o", "--trace", "--picture step.svg", "--picture step.png"])
def test_a_file_that_cannot_be_written_is_an_error_and_no_traceback(
    plan: Plan, tmp_path: Path, option: str
) -> None:
    name, _, last = option.partition(" ")
    path = tmp_path / (last or "folder")
    path.mkdir()
    with pytest.raises(HeadwaterError, match=f"^{re.escape(str(path))}: cannot be written: .*directory"):
        plan(*SMALL, name, str(path))
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / (last or "plan")
    with pytest.raises(HeadwaterError, match=f"^{re.escape(str(below))}: cannot be written: "):
        plan(*SMALL, name, str(below))


# How little it needs


def test_planning_loads_neither_torch_nor_prefect_and_leaves_no_store(home: Path) -> None:
    code = (
        "import sys; from flows.cli import application; "
        "application()(['plan', '--preset', 'smoke', '--json'], standalone_mode=False); "
        "loaded = {'torch', 'prefect', 'matplotlib', 'datasets'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not home.exists()


# A run of many GPUs


def models(preset: Any) -> set[str]:
    return {name for name, node in preset.nodes.items() if isinstance(node.config, ModelStageConfig)}


def test_models_of_many_gpus_are_refused_before_anything_is_built(store: Store, capsys: Capture) -> None:
    with pytest.raises(ConfigError) as refusal:
        perform(Request("v3", prefect=False))
    text = str(refusal.value)
    for part in ("cluster.gpus is 2048", "pretrain, extend_32k", "headwater plan", "cluster.gpus=1", "--to"):
        assert part in text
    assert store.names.run("v3") is None
    assert not list(store.home.glob("**/manifest.json"))
    with pytest.raises(ConfigError, match=r"cluster\.gpus is 2048"):
        application()(["run", "--preset", "v3", "--no-prefect"], standalone_mode=False)


def test_what_needs_no_model_can_still_be_built(store: Store) -> None:
    preset = load("v3")
    pipeline = Pipeline(store, preset, options=Options(stop=("pack", "pack_32k", "pack_128k")))
    assert "pack_128k" in pipeline.wanted
    assert not models(preset) & pipeline.wanted
    # Up to any model it is refused, and so is what comes after one.
    for options in (Options(stop=("pretrain",)), Options(start=("reward",))):
        with pytest.raises(ConfigError, match=r"cluster\.gpus is 2048"):
            Pipeline(store, preset, options=options)


def test_on_one_gpu_the_same_preset_runs(store: Store) -> None:
    preset = load("v3", ["cluster.gpus=1"])
    assert models(preset) <= Pipeline(store, preset).wanted
    for name in shipped():
        if name != "v3":
            assert load(name).cluster.gpus == 1
            Pipeline(store, load(name))


def test_one_node_of_such_a_run_is_refused_alike(store: Store) -> None:
    from flows.single import from_run

    Pipeline(store, load("v3"), options=Options(stop=("prompts",)), listen=lambda *_: None).resolve()
    with pytest.raises(ConfigError, match=r"cluster\.gpus is 2048.*pretrain cannot be built"):
        Pipeline(store, from_run(store, "v3", "pretrain"), "v3")
    Pipeline(store, from_run(store, "v3", "pretrain", ["cluster.gpus=1"]), "v3")
    Pipeline(store, from_run(store, "v3", "pack"), "v3")
