"""The command line on a toy store: what each command says, its exit codes, and how little it loads."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import application, check_own
from infra.errors import HeadwaterError
from infra.store import Store
from tests.flows.conftest import TOY, environment

Toy = Callable[..., Any]
Command = Callable[..., subprocess.CompletedProcess[str]]


def ran(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """The standard output of a command that was to end with `code`, without a traceback."""
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout


def test_run_reports_and_the_second_time_needs_neither_prefect_nor_workers(
    headwater: Command, home: Path
) -> None:
    out = ran(headwater("run", "--preset", str(TOY), "--no-prefect"))
    assert "train    built" in out
    assert "holds training helps: 0.5 (at least 0.4)" in out
    assert "train loss: 1 " in out
    assert "answer is slow@" in out
    assert f"report  {home}/reports/toy/report.html" in out
    began = time.monotonic()
    done = headwater("run", "--preset", str(TOY))
    assert time.monotonic() - began < 8
    assert "train    cached" in ran(done)
    assert done.stderr == ""
    assert not (home / "prefect").exists()


def test_what_went_wrong_is_told_whole_once(headwater: Command) -> None:
    run = ("run", "--preset", str(TOY), "--no-prefect", "--set", "left.crash=exception")
    done = headwater(*run)
    assert done.returncode == 1
    said = done.stderr + done.stdout
    assert said.count("Traceback (most recent call last)") == 1
    assert "left failed: ValueError: an unforeseen number" in said
    again = f"headwater run --preset {TOY} --set left.crash=exception --no-prefect"
    assert f"when it is mended: {again}\n" in said
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("left ")]
    assert row.rstrip().endswith("ValueError: an unforeseen number")
    done = headwater("stage", "left", "--run", "toy")
    assert "left failed: ValueError: an unforeseen number\n" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1


def test_a_gate_that_fails_withholds_the_name(headwater: Command, store: Store) -> None:
    done = headwater("run", "--preset", str(TOY), "--no-prefect", "--set", "train.steps=2")
    out = ran(done, code=3)
    assert "FAILS training helps: 0 (at least 0.4)" in out
    assert "not promoted to answer: train.score is 0.25, at least 0.5 is asked" in out
    assert store.names.get("answer") is None


def test_one_stage_of_a_run_makes_one_artifact_and_diff_names_the_field(
    quick: Toy, headwater: Command, store: Store
) -> None:
    ran(headwater("run", "--preset", str(TOY), "--no-prefect"))
    before, refs = store.resolve("toy/train"), set(store.refs())
    again = ("train", "--run", "toy", "--set", "train.steps=6")
    assert "train: config.steps: 4 -> 6" in ran(headwater("why", *again))
    done = headwater("stage", *again)
    ran(done)
    assert f"in the store as {store.resolve('toy/train').ref}" in ran(headwater("why", *again))
    (made,) = set(store.refs()) - refs
    assert store.resolve("toy/train").ref == made
    assert "config.steps: 4 -> 6" in done.stderr
    out = ran(headwater("diff", before.ref, "toy/train"))
    asked = out.partition("asked for:\n")[2].partition("what came out")[0]
    assert asked == "  config.steps: 4 -> 6\n"
    assert "where and how fast" not in out
    assert "last: inputs.numbers: " in ran(headwater("why", "last", "--run", "toy"))
    # A node after it reads the newest attempt; the preset, run again, goes back to its own.
    ran(headwater("stage", "last", "--run", "toy"))
    assert {pin.ref for pin in store.resolve("toy/last").record.inputs} > {made}
    assert "train    cached" in ran(headwater("run", "--preset", str(TOY)))
    assert store.resolve("toy/train").ref == before.ref
    assert made in ran(headwater("show", "toy"))


def test_a_stage_takes_inputs_by_reference(quick: Toy, headwater: Command, store: Store) -> None:
    result, _ = quick()
    control = result.outcomes["control"].artifact.ref
    done = headwater("stage", "last", "--run", "toy", "--input", f"numbers={control}")
    ran(done)
    assert control in [pin.ref for pin in store.resolve("toy/last").record.inputs if pin.role == "numbers"]


def test_without_a_run_a_stage_asks_for_its_inputs(headwater: Command) -> None:
    done = headwater("stage", "sft")
    ran(done, code=1)
    assert "sft needs" in done.stderr
    done = headwater("stage", "train")
    ran(done, code=1)
    assert "train is no stage; give --run" in done.stderr
    done = headwater("stage", "train", "--run", "tyo")
    ran(done, code=1)
    assert "no run is called 'tyo'" in done.stderr


def test_looking_at_a_store(quick: Toy, headwater: Command, store: Store) -> None:
    ran(headwater("run", "--preset", str(TOY), "--no-prefect"))
    train = store.resolve("toy/train")
    listed = ran(headwater("ls"))
    assert len(listed.splitlines()) == 6
    assert f"{train.ref}  " in listed
    assert "toy/train" in listed
    assert len(json.loads(ran(headwater("ls", "source", "--json")))) == 2
    assert "toy" in ran(headwater("ls", "--runs"))
    shown = ran(headwater("show", "toy/train"))
    assert train.digest in shown
    assert "steps = 4" in shown
    assert json.loads(ran(headwater("show", train.ref, "--json")))["fingerprint"] == train.record.fingerprint
    assert "holds  training helps" in ran(headwater("show", "toy"))
    assert "5 artifacts" in ran(headwater("verify", "answer"))
    assert "5 artifacts indexed" in ran(headwater("reindex"))
    assert "control: config.steps: 2 -> 3" in ran(
        headwater("why", "control", "--preset", str(TOY), "--set", "control.steps=3")
    )


def test_lineage_in_every_form(headwater: Command, store: Store, tmp_path: Path) -> None:
    ran(headwater("run", "--preset", str(TOY), "--no-prefect"))
    assert "source@" in ran(headwater("lineage", "answer"))
    graph = json.loads(ran(headwater("lineage", "answer", "--json")))
    assert {node["stage"] for node in graph["nodes"]} == {"source", "slow"}
    assert len(graph["nodes"]) == 5
    assert "slow@" in ran(headwater("lineage", "toy/left", "--downstream"))
    assert ran(headwater("lineage", "answer", "--mermaid")).startswith("flowchart")
    page = tmp_path / "page.html"
    assert ran(headwater("lineage", "answer", "--html", "-o", str(page))) == f"{page}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(ran(headwater("lineage", "answer", "--provenance")))["_type"].startswith(
        "https://in-toto"
    )
    done = headwater("lineage", "answer", "--json", "--html")
    ran(done, code=1)
    assert "give one of" in done.stderr


def test_verify_finds_a_flipped_byte(quick: Toy, headwater: Command) -> None:
    ran(headwater("run", "--preset", str(TOY), "--no-prefect"))
    result, _ = quick()
    victim = result.outcomes["left"].artifact.path / "numbers.json"
    content = bytearray(victim.read_bytes())
    content[-2] ^= 1
    victim.write_bytes(content)
    found = headwater("verify", "toy/last")
    assert str(victim) in ran(found, code=1)
    # Following the advice heals it, though what is downstream still pins the damaged attempt.
    (advised,) = [line for line in found.stdout.splitlines() if " again: headwater " in line]
    words = shlex.split(advised.partition(" again: headwater ")[2])
    ran(headwater(*words, "--no-prefect"))
    done = headwater("verify", "toy/last")
    assert "all as published" in ran(done)
    assert f"healed   {result.outcomes['left'].artifact.ref}: {victim}: content changed" in done.stdout


def test_promote_and_gc(quick: Toy, headwater: Command, store: Store) -> None:
    result, _ = quick()
    kept = result.outcomes["control"].artifact.ref
    assert ran(headwater("promote", "toy/control", "best/one")) == f"best/one is {kept}\n"
    assert "0 to remove" in ran(headwater("gc"))
    (store.home / "names" / "runs" / "toy.json").unlink()
    dry = ran(headwater("gc", "--hours", "0"))
    assert "3 to remove" in dry
    assert len(store.refs()) == 5
    assert "3 removed" in ran(headwater("gc", "--hours", "0", "--delete"))
    assert sorted(store.refs()) == sorted([kept, result.outcomes["left"].artifact.ref])


def test_gates_over_seeds(headwater: Command, store: Store) -> None:
    out = ran(headwater("gates", "--preset", str(TOY), "--seeds", "2"))
    assert "training helps" in out
    assert out.count("0.5") >= 3
    assert store.resolve("toy-seed1/train").record.seed == 1
    assert "last" not in store.names.run("toy-seed1")["nodes"], "only what the gates need is built"
    ran(headwater("gates", "--preset", str(TOY), "--seeds", "1", "--set", "train.steps=2"), code=1)


def test_openlineage_events_are_sent_where_asked(headwater: Command, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    ran(headwater("run", "--preset", str(TOY), "--no-prefect", "--openlineage", str(events)))
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert {line["job"]["name"] for line in lines} == {
        f"toy.{n}" for n in ("left", "right", "train", "control", "last")
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--preset", "demmo"), 1, "no preset named 'demmo'"),
        (("run", "--preset", str(TOY), "--from", "trian"), 1, "no node 'trian'"),
        (("run", "--preset", str(TOY), "--set", "train.stesp=1"), 1, "steps"),
        (("show", "nothing"), 1, "'nothing' means nothing"),
        (("lineage", "toy/last"), 1, "toy/last"),
        (("why", "sft", "--run", "nothing"), 1, "no run is called 'nothing'"),
        (("--home", "~nosuchuser", "ls"), 1, "--home ~nosuchuser: there is no such user"),
        (("report", "nothing"), 1, "no run is called 'nothing'"),
        (("stage", "last", "--input", "numbers"), 1, "expected ROLE=REF"),
        (("nosuch",), 2, "No such command"),
        (("ls", "--limit", "many"), 2, "--limit"),
    ],
)
def test_errors_say_what_is_wrong_without_a_traceback(
    headwater: Command, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = headwater(*arguments)
    ran(done, code)
    assert message in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_says_so(headwater: Command) -> None:
    done = headwater("--home", "/proc/nowhere", "run", "--preset", str(TOY))
    ran(done, code=1)
    assert "HEADWATER_HOME" in done.stderr


def test_looking_writes_nothing(
    quick: Toy, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = quick(stop=("train",))
    left, train = (result.outcomes[name].artifact for name in ("left", "train"))
    read_only = (
        ["ls"],
        ["ls", "--runs"],
        ["show", "toy"],
        ["show", train.ref],
        ["lineage", train.ref],
        ["lineage", left.ref, "--downstream"],
        ["verify", train.ref],
        ["diff", left.ref, "toy/right"],
        ["why", "train", "--run", "toy"],
    )
    folders = [store.home, *(path for path in store.home.rglob("*") if path.is_dir())]
    files = sorted(path for path in store.home.rglob("*") if path.name != "index.sqlite")
    # Root may write anywhere, so the modes alone prove nothing: the home is also said not to be writable.
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: mode != os.W_OK and may(path, mode, **more))
    for folder in folders:
        folder.chmod(0o555)
    try:
        for arguments in read_only:
            with pytest.raises(SystemExit) as ended:
                application()(arguments, prog_name="headwater")
            assert ended.value.code == 0, arguments
            assert capsys.readouterr().out, arguments
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert sorted(path for path in store.home.rglob("*") if path.name != "index.sqlite") == files


def test_a_home_that_is_a_file_says_so(headwater: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = headwater("--home", str(tmp_path / "file"), "ls")
    ran(done, code=1)
    assert "is a file" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("ls",), ("show", "toy/train"), ("lineage", "toy/train"), ("--help",), ("run", "--help")]
)
def test_light_commands_load_nothing_heavy(quick: Toy, home: Path, arguments: tuple[str, ...]) -> None:
    if arguments[0] != "run" and not arguments[0].startswith("-"):
        quick(stop=("train",))
    code = (
        "import atexit, sys\nfrom flows.cli import main\n"
        "heavy = {'torch', 'prefect', 'datasets', 'transformers', 'tokenizers', 'matplotlib', 'pyarrow'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['headwater', *{list(arguments)!r}]\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(home), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stderr


def test_a_closed_pipe_is_no_error(quick: Toy, home: Path) -> None:
    quick(stop=("left",))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.cli", "show", "toy/left"],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=30)
    assert b"Traceback" not in errors


def test_packages_of_other_projects_are_noticed(tmp_path: Path) -> None:
    check_own()
    with pytest.raises(HeadwaterError, match=r"the package 'json' is .*Unset PYTHONPATH"):
        check_own(tmp_path, ["json"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", "ls"],
        env={**environment(tmp_path / "home"), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"the package 'data' is {tmp_path / 'data'}" in done.stderr


def test_the_command_is_installed() -> None:
    script = Path(sys.executable).parent / "headwater"
    assert (
        "Usage: headwater"
        in subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60).stdout
    )


def test_one_file_that_cannot_be_read_hides_no_other(quick: Toy, headwater: Command, store: Store) -> None:
    result, _ = quick(stop=("left",))
    (store.home / "names" / "runs" / "torn.json").write_text("{")
    for arguments in (("ls",), ("ls", "--runs"), ("show", "toy/left"), ("lineage", "toy/left")):
        done = headwater(*arguments)
        assert ("toy" if "--runs" in arguments else result.outcomes["left"].artifact.ref) in ran(done)
        assert ("names/runs/torn.json: not readable as JSON" in done.stderr) is (arguments[0] != "lineage")
    done = headwater("gc")
    ran(done, code=1)
    assert "names/runs/torn.json" in done.stderr, "what a run needs must be known before anything goes"


def test_looking_makes_no_home(headwater: Command, home: Path) -> None:
    for arguments in (("ls",), ("ls", "--runs")):
        ran(headwater(*arguments))
    ran(headwater("show", "x"), code=1)
    assert not home.exists()


def test_a_path_into_another_store(quick: Toy, headwater: Command, store: Store, tmp_path: Path) -> None:
    result, _ = quick()
    last = str(result.outcomes["last"].artifact.path)
    here = ("--home", str(tmp_path / "here"))
    assert "5 artifacts" in ran(headwater(*here, "verify", last))
    assert "source@" in ran(headwater(*here, "lineage", last))
    assert "toy/last" in ran(headwater(*here, "show", last))
    done = headwater(*here, "promote", last, "best")
    ran(done, code=1)
    assert f"but in {store.home}: work there (--home {store.home})" in done.stderr
    preset = tmp_path / "from_path.yaml"
    nodes = f"nodes:\n  more: {{stage: slow, inputs: {{numbers: '@{last}'}}}}\n"
    preset.write_text(f"stages: ['{TOY.parent}']\n{nodes}")
    done = headwater(*here, "run", "--preset", str(preset), "--no-prefect")
    ran(done, code=1)
    assert f"but in {store.home}: work there" in done.stderr


def test_a_name_that_a_run_has_too_is_the_name(quick: Toy, headwater: Command, store: Store) -> None:
    result, _ = quick(stop=("left",))
    assert "node" in ran(headwater("show", "toy"))
    store.promote("toy/left", "toy")
    done = headwater("show", "toy")
    assert ran(done).splitlines()[0].endswith(result.outcomes["left"].artifact.ref)
    assert "headwater show toy --run" in done.stderr
    assert ran(headwater("show", "toy", "--run")).split()[0] == "node"
    assert headwater("show", "toy").stdout.split()[1] in ran(headwater("lineage", "toy"))
