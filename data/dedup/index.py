"""What a later run needs to know of documents that were kept: their exact keys and signatures, beside the
documents.

The index lies in `index/` of a dedup artifact, in the order of its `documents/`. The texts are not copied:
when a new document meets an old one in a band, the old text is read from `documents/` and compared for
real.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from infra.errors import HeadwaterError
from infra.files import read_tensors_metadata, write_parquet, write_tensors


@dataclass(frozen=True)
class Settings:
    """How documents are compared. Indexes of other settings cannot be mixed."""

    ngram: int = 5  # words in a shingle
    bands: int = 14
    rows: int = 8
    threshold: float = 0.8  # exact Jaccard similarity from which two documents are duplicates
    seed: int = 0

    def signature_form(self) -> dict[str, int]:
        """What two signatures must agree in to be comparable."""
        return {"ngram": self.ngram, "bands": self.bands, "rows": self.rows, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class Index:
    """Kept documents, in the order of `documents/`."""

    ids: list[str]
    exact: np.ndarray  # [documents, 16] uint8
    signatures: np.ndarray  # [documents, bands * rows] uint32


def write_index(folder: Path, index: Index, settings: Settings) -> None:
    """Write an index to a folder: ids.parquet and signatures.safetensors."""
    write_parquet(folder / "ids.parquet", pa.table({"id": pa.array(index.ids, pa.string())}))
    tensors = {"exact": index.exact, "signatures": index.signatures}
    write_tensors(folder / "signatures.safetensors", tensors, settings.signature_form())


def read_index(folder: Path, settings: Settings) -> Index:
    """Read an index. Raises HeadwaterError when it is damaged or was made with other settings."""
    path = folder / "signatures.safetensors"
    try:
        form = read_tensors_metadata(path)
        tensors = load_file(path)
        ids = pq.read_table(folder / "ids.parquet").column("id").to_pylist()
    except (OSError, ValueError, KeyError, SafetensorError, pa.ArrowException) as error:
        raise HeadwaterError(f"{folder} is not a readable dedup index: {error}") from error
    for name, value in settings.signature_form().items():
        if form.get(name) != value:
            raise HeadwaterError(
                f"{folder} was made with {name} = {form.get(name)}, this run uses {value}: set {name} to "
                f"{form.get(name)}, or leave this index out"
            )
    if len(ids) != len(tensors["signatures"]) or len(ids) != len(tensors["exact"]):
        raise HeadwaterError(f"{folder}: {len(ids)} ids for {len(tensors['signatures'])} signatures")
    return Index(ids, tensors["exact"], tensors["signatures"])
