import ast
import gzip
import json
import os
import re
import struct
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.documents import Document, DocumentWriter, kind_of, write_rejected
from data.sources.arrow import DatasetsSource
from data.sources.base import Reading, Rejection
from data.sources.resolve import resolve
from data.sources.stdlib import StdlibSource, split_docstrings
from data.sources.sysdocs import SysdocsSource
from data.sources.tree import FileSource, GitSource, TreeSource
from infra.errors import ConfigError, HeadwaterError

MODULE = '''"""Module words."""
import os

class A:
    """Class words
        indented."""
    x = """kept: not a docstring"""

    async def f(self, a, *, b=1):
        "Method words."

def g(): "shares its line"

if os:
    def h(x):
        """Nested é words."""  # a comment
        return x
'''


def read_all(source, reading: Reading | None = None) -> tuple[list[Document], list[Rejection]]:
    candidates = [one for one in source.candidates() if not one.skipped]
    found = [item for one in candidates for item in source.read(one, reading or Reading())]
    return (
        [item for item in found if isinstance(item, Document)],
        [item for item in found if isinstance(item, Rejection)],
    )


def test_docstrings_leave_the_code_and_keep_their_signatures():
    code, prose = split_docstrings(MODULE, "m")
    tree = ast.parse(code)
    assert "Module words" not in code
    assert "Class words" not in code
    assert "Method words" not in code
    assert "kept: not a docstring" in code
    assert "shares its line" in code  # on a line with code: left where it is
    assert [type(node).__name__ for node in tree.body] == ["Import", "ClassDef", "FunctionDef", "If"]
    assert prose.startswith("m\n\nModule words.\n\nclass m.A\n\nClass words\n")
    assert "m.A.f(self, a, *, b=1)\n\nMethod words." in prose
    assert "m.g()\n\nshares its line" in prose


def test_source_that_does_not_parse_is_all_code():
    assert split_docstrings("def f(:\n", "m") == ("def f(:\n", "")


def test_a_lone_carriage_return_ends_a_line_as_the_parser_says():
    code, prose = split_docstrings('x = 1\r"not one"\rdef f():\r    """Words."""\r    return 1\r', "m")
    assert code == 'x = 1\n"not one"\ndef f():\n    return 1\n'
    assert prose == "m.f()\n\nWords.\n"
    assert split_docstrings('"""A\rB\rC\rD"""', "m")[1] == "m\n\nA\nB\nC\nD\n"


def test_source_nested_too_deep_to_walk_is_all_code():
    text = "x = " + "+".join(["1"] * 2000) + "\n"
    assert split_docstrings(text, "m") == (text, "")


def test_stdlib_of_this_interpreter_has_code_and_prose():
    source = StdlibSource()
    candidates = {one.name: one for one in source.candidates()}
    assert not any("/test/" in name or "site-packages" in name for name in candidates)
    code, prose = source.read(candidates["python/textwrap.py"], Reading())
    assert (code.source, code.kind, prose.source, prose.kind) == (
        "stdlib-code",
        "code",
        "stdlib-docstrings",
        "text",
    )
    assert code.licence == "PSF-2.0"
    assert code.origin == prose.origin
    assert "textwrap.dedent(text)" in prose.text
    ast.parse(code.text)


def test_sysdocs_takes_prose_packed_or_not_and_may_be_absent(tmp_path: Path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "copyright").write_text("You may copy.", encoding="utf-8")
    (tmp_path / "pkg" / "index.html").write_text("<p>no</p>", encoding="utf-8")
    (tmp_path / "pkg" / "changelog.Debian.gz").write_bytes(gzip.compress(b"pkg (1.0) unstable"))
    (tmp_path / "link").symlink_to(tmp_path / "pkg")
    documents, rejections = read_all(SysdocsSource(tmp_path))
    assert [(d.path, d.text) for d in documents] == [
        ("doc/pkg/changelog.Debian.gz", "pkg (1.0) unstable"),
        ("doc/pkg/copyright", "You may copy."),
    ]
    assert not rejections
    assert SysdocsSource(tmp_path / "absent").candidates() == []


def test_tree_reads_known_names_and_leaves_hidden_and_foreign_folders(tmp_path: Path):
    root = tmp_path / "corpus"
    for name in ("a.md", "src/b.py", ".git2/c.md", "node_modules/d.md", "e.png", "README", "sub/f.jsonl"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": "from json"}) if name.endswith("jsonl") else name, "utf-8")
    documents, _ = read_all(TreeSource(root))
    assert [d.path for d in documents] == [
        "corpus/README",
        "corpus/a.md",
        "corpus/src/b.py",
        "corpus/sub/f.jsonl#0",
    ]
    assert [d.kind for d in documents] == ["text", "text", "code", "text"]
    again, _ = read_all(TreeSource(root))
    assert [d.id for d in again] == [d.id for d in documents]
    assert len({d.id for d in documents}) == 4


def test_git_gives_the_tracked_files_only(tmp_path: Path):
    root = tmp_path / "repo"
    root.mkdir()
    for name in ("kept.py", "with space.md", "untracked.py"):
        (root / name).write_text(f"# {name}", "utf-8")
    for command in (["init", "-q"], ["add", "kept.py", "with space.md"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    (source,) = resolve(str(root))
    assert isinstance(source, GitSource)
    documents, _ = read_all(source)
    assert [d.path for d in documents] == ["repo/kept.py", "repo/with space.md"]
    (root / ".git" / "index").write_bytes(b"broken")
    with pytest.raises(HeadwaterError, match="git cannot list"):
        source.candidates()


BAD_LINES = [
    (b"{not json", "invalid JSON"),
    (b"[1]", "invalid JSON: not an object"),
    (b'{"other": 1}', "no text in field 'text' (set text_field; it has: other)"),
    (b'{"text": 5}', "no text in field 'text' (set text_field; it has: text)"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10 of the line"),
    (b'{"text": "\\ud800"}', "invalid Unicode: half of a surrogate pair"),
    (b'{"text": "a\\u0000b"}', "binary: holds a NUL character"),
    (b'{"text": "  "}', "empty"),
    (b'{"text": "' + b"x" * 101 + b'"}', "larger than max_document_bytes (100)"),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_reads_good_lines_and_names_bad_ones(tmp_path: Path, suffix: str):
    raw = b"\n".join(
        [b'{"text": "first", "who": "me"}', b"", *(line for line, _ in BAD_LINES), b'{"text": "z"}']
    )
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif suffix == ".zst":
        path.write_bytes(pa.compress(raw, "zstd", asbytes=True))
    else:
        path.write_bytes(raw)
    reading = Reading(max_document_bytes=100, licence_field="who", licence="none")
    documents, rejections = read_all(FileSource(path), reading)
    assert [(d.path, d.text, d.licence) for d in documents] == [
        (f"a.jsonl{suffix}#0", "first", "me"),
        (f"a.jsonl{suffix}#{len(BAD_LINES) + 2}", "z", "none"),
    ]
    assert [r.reason for r in rejections] == [reason for _, reason in BAD_LINES]


def test_a_line_of_any_length_is_skipped_in_steps(tmp_path: Path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as handle:
        handle.write(b'{"text": "before"}\n{"text": "')
        for _ in range(40):
            handle.write(b"x" * 100_000)
        handle.write(b'"}\n{"text": "after"}\n')
    documents, rejections = read_all(FileSource(path), Reading(max_document_bytes=1000))
    assert [d.text for d in documents] == ["before", "after"]
    assert [r.reason for r in rejections] == ["larger than max_document_bytes (1000)"]


def test_torn_archives_are_quarantined_with_what_came_before(tmp_path: Path):
    path = tmp_path / "torn.jsonl.gz"
    lines = b"".join(b'{"text": "%d %d"}\n' % (i, i**7) for i in range(5000))
    path.write_bytes(gzip.compress(lines)[:-4000])
    documents, rejections = read_all(FileSource(path))
    assert documents
    assert rejections[-1].reason.startswith("unreadable")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 not really")
    _, rejections = read_all(FileSource(tmp_path / "torn.parquet"))
    assert [r.reason for r in rejections] == ["unreadable: ArrowInvalid"]


def test_parquet_rows_and_a_missing_field(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, "three"], "n": [1, 2, 3]}), path)
    documents, rejections = read_all(FileSource(path), Reading(text_field="body"))
    assert [(d.path, d.text) for d in documents] == [("a.parquet#0", "one"), ("a.parquet#2", "three")]
    assert [r.path for r in rejections] == ["a.parquet#1"]
    _, rejections = read_all(FileSource(path))
    assert rejections[0].reason == "no text in field 'text' (set text_field; it has: body, n)"


def test_a_share_of_records_is_even_and_nested(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(2000)), "utf-8")
    few, left = read_all(FileSource(path), Reading(share=0.1))
    many, _ = read_all(FileSource(path), Reading(share=0.5))
    assert 150 < len(few) < 250
    assert {d.id for d in few} <= {d.id for d in many}
    assert not any(r.quarantined for r in left)


def test_saved_datasets_are_read_without_a_network(tmp_path: Path):
    import datasets

    table = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(10)]})
    datasets.disable_progress_bars()
    table.select(range(3, 7)).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    documents, _ = read_all(DatasetsSource(str(tmp_path / "one")))
    assert [d.text for d in documents] == [f"text {i}" for i in range(3, 7)]
    documents, _ = read_all(DatasetsSource(str(tmp_path / "two"), split="test"))
    assert [d.path for d in documents] == ["two/test/00000.arrow#0"]
    with pytest.raises(HeadwaterError, match="no split 'dev'; it has train, test"):
        DatasetsSource(str(tmp_path / "two"), split="dev").candidates()


def save_arrow(folder: Path, table: pa.Table) -> DatasetsSource:
    folder.mkdir(exist_ok=True)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}), "utf-8")
    return DatasetsSource(str(folder))


def test_rows_of_a_dataset_that_are_no_text_are_quarantined_one_by_one(tmp_path: Path):
    ends, raw = struct.pack("<4i", 0, 2, 5, 5), b"\xff\xfeabc"
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(ends), pa.py_buffer(raw)])
    documents, rejections = read_all(save_arrow(tmp_path / "odd", pa.table({"text": column})))
    assert [d.text for d in documents] == ["abc"]
    assert [r.reason for r in rejections] == ["invalid UTF-8 at byte 0", "empty"]


def test_a_table_without_one_column_of_text_says_what_it_has(tmp_path: Path):
    tables = [
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        pa.table({"body": ["a", "b"], "id": [1, 2]}),
    ]
    for table, fields in zip(tables, ("text, text", "body, id"), strict=True):
        pq.write_table(table, tmp_path / "rows.parquet")
        for source in (FileSource(tmp_path / "rows.parquet"), save_arrow(tmp_path / "saved", table)):
            documents, rejections = read_all(source)
            assert documents == []
            assert [r.reason for r in rejections] == [
                f"no text in field 'text' (set text_field; it has: {fields})"
            ]


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"_data_files": [{}]}'])
def test_a_damaged_dataset_folder_is_named(tmp_path: Path, state: str):
    (tmp_path / "state.json").write_text(state, "utf-8")
    with pytest.raises(HeadwaterError, match=re.escape(str(tmp_path))):
        DatasetsSource(str(tmp_path)).candidates()


@pytest.mark.parametrize("words", ["~nosuchuser/x", "x" * 5000, "a\0b"])
def test_paths_that_cannot_be_do_not_exist(words: str):
    with pytest.raises(ConfigError, match="sources: there is no"):
        resolve(words)


def test_a_dataset_that_cannot_be_loaded_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HeadwaterError, match="without it give the folder"):
        DatasetsSource("no-such-org/no-such-data").candidates()


def test_unreadable_files_are_seen_before_reading(tmp_path: Path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "big.txt").write_bytes(b"x" * 50)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhi")
    documents, rejections = read_all(TreeSource(tmp_path), Reading(max_document_bytes=20))
    assert [d.text for d in documents] == ["hi"]
    assert {Path(r.path).name: r.reason for r in rejections} == {
        "gone.txt": "unreadable: No such file or directory",
        "pipe.txt": "unreadable: not a regular file",
        "bad.txt": "invalid UTF-8 at byte 3",
        "nul.txt": "binary: holds a NUL character",
        "big.txt": "larger than max_document_bytes (20)",
    }
    assert all(r.quarantined for r in rejections)


def test_names_that_are_not_utf8_are_escaped_in_every_source(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    odd = root / os.fsdecode(b"na\xefve.txt")
    odd.write_text("x", "utf-8")
    for source, name in (
        (TreeSource(root), "in/na\\xefve.txt"),
        (SysdocsSource(root), "doc/na\\xefve.txt"),
        (FileSource(odd), "na\\xefve.txt"),
    ):
        (document,) = read_all(source)[0]
        assert document.path == name
    odd.rename(root / os.fsdecode(b"na\xefve.py"))
    assert [one.name for one in StdlibSource(root).candidates()] == ["python/na\\xefve.py"]


def test_half_a_surrogate_beside_the_text_is_escaped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "by": "\\ud800"}\n{"n\\udcff\\udfff": 1}\n', "utf-8")
    (document,), (rejection,) = read_all(FileSource(path), Reading(licence_field="by"))
    assert document.licence == "\\ud800"
    assert rejection.reason.endswith("it has: n\\udcff\\udfff)")
    with DocumentWriter(tmp_path / "out") as writer:
        writer.add(document)
    write_rejected(tmp_path / "rejected.parquet", [("", "file", rejection.path, rejection.reason)])


def test_resolve_words(tmp_path: Path):
    odd = tmp_path / "a,b.txt"
    odd.write_text("x", "utf-8")
    assert isinstance(resolve(str(odd))[0], FileSource)
    assert [s.name for s in resolve(f"builtin,{tmp_path}")] == ["stdlib", "sysdocs", "folder"]
    assert [s.name for s in resolve("sysdocs , datasets:a/b")] == ["sysdocs", "datasets"]
    with pytest.raises(
        ConfigError, match=r"there is no 'nothing/here' in /.*must be absolute\); give builtin"
    ):
        resolve("stdlib,nothing/here")
    with pytest.raises(ConfigError, match="sources is empty"):
        resolve(" , ")


@pytest.mark.parametrize(
    ("source", "path", "kind"),
    [
        ("folder", "a/b.PY", "code"),
        ("folder", "a/b.py.gz", "code"),
        ("folder", "a/b.md", "text"),
        ("folder", "c.jsonl#3", "text"),
        ("stdlib-docstrings", "a/b.py#docstrings", "text"),
        ("mine-code", "x", "code"),
    ],
)
def test_kind_of_document(source, path, kind):
    assert kind_of(source, path) == kind
