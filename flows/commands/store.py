"""`ls`, `show`, `diff`, `verify`, `promote`, `gc` and `reindex`: looking after the store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.artifact import Artifact
from infra.store import Store, open_store

Ref = Annotated[str, typer.Argument(metavar="REF", help="run/node, a promoted name, stage@id or a path.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("ls")(ls)
    for command in (show, diff, verify, promote, gc, reindex):
        app.command()(command)


def ls(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Only artifacts of this stage.")] = "",
    runs: Annotated[bool, typer.Option("--runs", help="List runs instead.")] = False,
    presets: Annotated[
        bool, typer.Option("--presets", help="List the presets that come with Headwater.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most this many (0 = all).")] = 50,
    as_json: AsJson = False,
) -> None:
    """List artifacts, newest first."""
    if presets:
        from flows.preset import shipped

        for name in shipped():
            print(name)
        return
    store = open_store(write=False)
    if runs:
        _ls_runs(store, limit, as_json)
        return
    from infra.index import rows

    found = rows(store, stage, limit)
    where = _places(store)
    if as_json:
        print(json.dumps([{**vars(row), "names": where.get(row.ref, [])} for row in found], indent=2))
        return
    known = {row.ref: " ".join(where.get(row.ref, [])) for row in found}
    _print(
        ("artifact", "made (UTC)", "size", "known as", "figures"),
        [[r.ref, _when(r.finished), size(r.bytes), known[r.ref], figures(r.metrics)] for r in found],
    )


def _ls_runs(store: Store, limit: int, as_json: bool) -> None:
    unread: list[str] = []
    runs = dict(list(store.names.runs(unread).items())[: limit or None])
    _warn(unread)
    if as_json:
        print(json.dumps(list(runs.values()), indent=2))
        return
    lines = []
    for name, document in runs.items():
        made = sum(1 for node in document["nodes"].values() if node["artifact"])
        info = document["info"]
        settings = " ".join(info.get("sets", []))
        lines.append([name, _when(document["updated"]), info.get("name", ""), str(made), settings])
    _print(("run", "updated (UTC)", "preset", "nodes", "settings"), lines)


def show(
    ref: Annotated[str, typer.Argument(metavar="REF", help="An artifact by reference, or a run by name.")],
    as_run: Annotated[
        bool, typer.Option("--run", help="The run, where a promoted name is the same.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show an artifact's record, or the nodes of a run with their earlier attempts.

    What is both a promoted name and a run is the name, as it is for every other command.
    """
    store = open_store(write=False)
    run = store.names.require_run(ref) if as_run else store.names.run(ref)
    if run is not None and not as_run and store.names.get(ref) is not None:
        print(f"headwater: {ref} is a run too: headwater show {ref} --run", file=sys.stderr)
        run = None
    if run is not None:
        if as_json:
            print(json.dumps(run, indent=2, sort_keys=True))
        else:
            _show_run(store, run)
        return
    artifact = store.resolve(ref)
    store = store.around(artifact)
    if as_json:
        print(artifact.record.render().decode(), end="")
    else:
        _show_artifact(store, artifact)


def _show_run(store: Store, run: Mapping[str, Any]) -> None:
    lines = []
    order = [name for name in run["info"].get("order", []) if name in run["nodes"]]
    for name in [*order, *(name for name in sorted(run["nodes"]) if name not in order)]:
        node = run["nodes"][name]
        stage, _, id = node["artifact"].partition("@")
        known = node["artifact"] and id in store.ids(stage)
        metrics = store.artifact(stage, id).metrics if known else {}
        earlier = [one["artifact"] for one in node["history"] if one["artifact"] != node["artifact"]]
        before = " ".join(dict.fromkeys(earlier))
        lines.append([name, node["stage"], node["status"], node["artifact"], before, figures(metrics)])
    _print(("node", "stage", "status", "artifact", "earlier attempts", "figures"), lines)
    for gate in run["info"].get("gates", []):
        value = "no figure" if gate["value"] is None else f"{gate['value']:.4g}"
        print(f"{'holds' if gate['holds'] else 'FAILS'}  {gate['name']}: {value} ({gate['bound']})")


def _show_artifact(store: Store, artifact: Artifact) -> None:
    record = artifact.record
    rows: list[tuple[str, str]] = [
        ("artifact", record.ref),
        ("known as", " ".join(_places(store).get(record.ref, []))),
        ("folder", str(artifact.path)),
        ("digest", record.digest),
        ("made (UTC)", f"{_when(record.started)} to {_when(record.finished)}, tries: {len(record.tries)}"),
        (
            "code",
            f"{record.code['commit'][:12] or 'no commit'}{' + changes' if record.code['dirty'] else ''}",
        ),
        (
            "machine",
            f"{record.environment['hardware']['cpu']}, threads {record.environment['numerics']['threads']}",
        ),
    ]
    rows += [("input " + one.role, f"{one.ref}  {one.digest[:12]}") for one in record.inputs]
    if record.sources:
        rows.append(("sources", f"{record.sources['files']:,} files, {size(record.sources['bytes'])}"))
    for kind, part in record.config.items():
        rows += [(kind, f"{name} = {value}") for name, value in _leaves(part)]
    rows += [("metric", f"{name} = {figure(value)}") for name, value in record.metrics.items()]
    rows += [("timing", f"{name} = {figure(value)}") for name, value in record.timings.items()]
    rows += [("file", f"{one.path}  {size(one.bytes)}") for one in (*record.files, *record.side_files)]
    if record.prefect:
        rows += [("prefect", f"{name} = {value}") for name, value in record.prefect.items()]
    before = ""
    for name, value in rows:
        print(f"{name if name != before else '':<12} {value}")
        before = name


def _leaves(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    from infra.diff import flatten

    return [(name, json.dumps(value, ensure_ascii=False)) for name, value in flatten(part)] if part else []


def diff(left: Ref, right: Ref, as_json: AsJson = False) -> None:
    """Name the fields in which two artifacts differ, those that make them different artifacts first."""
    from infra import diff as differences

    store = open_store(write=False)
    one, two = store.resolve(left), store.resolve(right)
    found = differences.diff(one.record, two.record)
    if as_json:
        print(json.dumps([vars(each) for each in found], indent=2))
        return
    print(f"{one.ref} -> {two.ref}")
    titles = {"identity": "asked for", "placement": "where and how fast", "result": "what came out"}
    for kind in differences.KINDS:
        listed = [each for each in found if each.kind == kind]
        if listed:
            print(f"{titles.get(kind, kind)}:")
            for each in listed:
                print(f"  {each}")
    if not any(each.kind == "identity" for each in found):
        print("the same was asked for: the identity fields are equal")
    began = [(path, each) for path, each in differences.causes(store, one.record, two.record) if path]
    if began:
        print("where the inputs began to differ:")
        for path, each in began:
            print(f"  {path}: {each}")


def verify(ref: Ref, as_json: AsJson = False) -> None:
    """Re-hash an artifact and all it was built from. Exit code 1 if anything is not as published."""
    from infra.mend import advice
    from infra.verify import verify as check

    store = open_store(write=False)
    artifact = store.resolve(ref)
    store = store.around(artifact)
    found = check(store, artifact)
    if as_json:
        problems = [vars(one) for one in found.problems]
        said = {"checked": found.checked, "files": found.files, "bytes": found.bytes, "problems": problems}
        said["healed"] = found.healed
        print(json.dumps(said, indent=2))
    else:
        for problem in found.problems:
            print(f"{problem.kind:<8} {problem}")
        for text in found.healed:
            print(f"healed   {text}")
        for one in dict.fromkeys(problem.ref for problem in found.problems):
            print(advice(store, one))
        state = "all as published" if found.ok else f"{len(found.problems)} problems"
        print(f"{len(found.checked)} artifacts, {found.files} files, {size(found.bytes)} re-hashed: {state}")
    if not found.ok:
        raise typer.Exit(1)


def promote(
    ref: Ref, name: Annotated[str, typer.Argument(metavar="NAME", help="Such as chat or corpus/live.")]
) -> None:
    """Point a name at an artifact; what it pointed at before stays in its history."""
    store = open_store()
    before = store.names.get(name)
    artifact = store.promote(ref, name, by="headwater promote")
    tail = f" (was {before['artifact']})" if before and before["artifact"] != artifact.ref else ""
    print(f"{name} is {artifact.ref}{tail}")


def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; without this, only say what would go.")
    ] = False,
    runs: Annotated[int, typer.Option(min=0, help="Keep what this many last runs reach.")] = 10,
    hours: Annotated[float, typer.Option(min=0, help="Keep what is younger than this.")] = 1.0,
    days: Annotated[float, typer.Option(min=0, help="Keep unfinished work touched within this.")] = 14.0,
) -> None:
    """Find what no name and no recent run needs any more."""
    from infra.gc import collect, plan_gc

    store = open_store()
    sweep = plan_gc(store, runs, hours, days)
    for one in sweep.garbage:
        print(f"{size(one.bytes):>10}  {one.ref or one.path}  {one.reason}")
    for path in sweep.strays:
        print(f"no artifact (it has no record.json), left alone: {path}; move it elsewhere")
    if not delete:
        print(
            f"{len(sweep.garbage)} to remove, {size(sweep.bytes)}; {len(sweep.kept)} kept (--delete removes)"
        )
        return
    removed, left = collect(store, sweep)
    for one, reason in left:
        print(f"left: {one.ref or one.path}: {reason}")
    print(f"{len(removed)} removed, {size(sum(one.bytes for one in removed))} freed; {len(sweep.kept)} kept")


def reindex() -> None:
    """Make the index anew from the records."""
    from infra.index import reindex as rebuild

    count, broken = rebuild(open_store())
    for ref, reason in broken.items():
        print(f"not readable: {ref}: {reason}")
    print(f"{count} artifacts indexed")
    if broken:
        raise typer.Exit(1)


def _places(store: Store) -> dict[str, list[str]]:
    """The names that each artifact is known by: promoted ones, then run/node."""
    found: dict[str, list[str]] = {}
    unread: list[str] = []
    for name, document in store.names.all(unread).items():
        found.setdefault(document["artifact"], []).append(name)
    for run, document in store.names.runs(unread).items():
        for node, entry in document["nodes"].items():
            if entry["artifact"]:
                found.setdefault(entry["artifact"], []).append(f"{run}/{node}")
    _warn(unread)
    return found


def _warn(unread: Iterable[str]) -> None:
    for reason in unread:
        print(f"headwater: left out: {reason}", file=sys.stderr)


def figure(value: Any) -> str:
    """A figure in few digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def figures(metrics: Mapping[str, Any], most: int = 4) -> str:
    """The first few numbers of a record in a line."""
    numbers = [(name, value) for name, value in metrics.items() if not isinstance(value, str)]
    return "  ".join(f"{name} {figure(value)}" for name, value in numbers[:most])


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _when(text: str) -> str:
    return text[:19].replace("T", " ")


def _print(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """A table. Piped output is for programs: no width to fit into, so that no reference is broken in two."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in ("size", "nodes") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
