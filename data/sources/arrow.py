"""A data set of the `datasets` library: a folder made by `save_to_disk`, or what `load_dataset` takes.

Either way the library leaves Arrow files on this disk; they are hashed and read as they are, without the
library.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data.documents import Document
from data.sources.base import UNREADABLE, Candidate, Reading, Rejection, candidate, unreadable
from data.sources.records import lost_rows, no_text, parse_row, wanted_columns
from infra.errors import HeadwaterError
from infra.files import read_json

_END = b"\xff\xff\xff\xff\0\0\0\0"


class DatasetsSource:
    """One split of a data set."""

    name = "datasets"

    def __init__(self, dataset: str, split: str = "train", subset: str = "") -> None:
        self.dataset = dataset
        self.split = split
        self.subset = subset

    def candidates(self) -> list[Candidate]:
        folder = Path(os.path.expanduser(self.dataset))
        saved = any(os.path.isfile(folder / name) for name in ("state.json", "dataset_dict.json"))
        files = saved_files(folder, self.split) if saved else self._loaded_files()
        root = folder.name if os.path.exists(folder) else self.dataset
        return [
            candidate(f"{root}/{self.split}/{place:05d}.arrow", file, records=True)
            for place, file in enumerate(files)
        ]

    def _loaded_files(self) -> list[Path]:
        import datasets  # slow to import, and only needed to fetch or convert

        try:
            loaded = datasets.load_dataset(self.dataset, self.subset or None, split=self.split)
        except Exception as error:
            raise HeadwaterError(
                f"cannot load split {self.split!r} of the data set {self.dataset!r}: {error}. A name needs "
                "the network once; without it give the folder of a data set saved with save_to_disk, or a "
                "folder of Parquet or JSON lines"
            ) from error
        files = [Path(entry["filename"]) for entry in loaded.cache_files]
        if not files:
            raise HeadwaterError(f"the data set {self.dataset!r} left no Arrow files on this disk to read")
        return files

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        if candidate.problem:
            yield Rejection(candidate.name, candidate.problem)
            return
        index = 0
        try:
            with pa.memory_map(str(candidate.file)) as mapped:
                stream = pa.ipc.open_stream(mapped)
                columns = wanted_columns(stream.schema.names, reading)
                if not columns:
                    reason = no_text(candidate.name, stream.schema.names, reading).reason
                    rows = sum(batch.num_rows for batch in stream)
                    yield from lost_rows(candidate.name, 0, rows, reason, reading)
                    return
                for batch in stream:
                    chosen = batch.select(columns)
                    for row in range(batch.num_rows):
                        yield parse_row(self.name, f"{candidate.name}#{index}", chosen, row, reading)
                        index += 1
            if not ends_whole(candidate.file):
                yield Rejection(f"{candidate.name}#{index}", "unreadable: cut off")
        except UNREADABLE as error:
            yield Rejection(f"{candidate.name}#{index}", unreadable(error))


def ends_whole(file: Path) -> bool:
    """Whether a stream ends in its mark; arrow takes one that breaks off between two batches for whole."""
    with file.open("rb") as handle:
        handle.seek(-min(len(_END), os.fstat(handle.fileno()).st_size), os.SEEK_END)
        return handle.read() == _END


def saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder made by `save_to_disk`, of one split if it holds several."""
    try:
        if (folder / "dataset_dict.json").is_file():
            names = read_json(folder / "dataset_dict.json")["splits"]
            if split not in names:
                raise HeadwaterError(f"{folder} has no split {split!r}; it has {', '.join(names)}: set split")
            folder = folder / split
        return [folder / entry["filename"] for entry in read_json(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError) as error:
        raise HeadwaterError(
            f"{folder} is not a data set as save_to_disk leaves it ({type(error).__name__}: {error})"
        ) from None
