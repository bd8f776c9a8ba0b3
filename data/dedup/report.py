"""The clusters that were found, as a table."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from data.dedup.deduplicate import Verdict
from infra.files import write_parquet

_SCHEMA = pa.schema(
    [
        ("cluster", pa.string()),  # id of the document that was kept
        ("id", pa.string()),
        ("kept", pa.bool_()),
        ("exact", pa.bool_()),
        ("jaccard", pa.float64()),  # with the one kept
        ("from_index", pa.bool_()),  # the one kept is an older document
    ]
)


def write_clusters(path: Path, verdicts: Sequence[Verdict]) -> None:
    """One row for each document of a cluster of two or more, clusters together."""
    sizes = Counter(verdict.representative for verdict in verdicts)
    rows = [v for v in verdicts if sizes[v.representative] > 1 or v.from_index]
    rows.sort(key=lambda v: (v.representative, not v.kept, v.id))
    columns = {
        "cluster": [v.representative for v in rows],
        "id": [v.id for v in rows],
        "kept": [v.kept for v in rows],
        "exact": [v.exact for v in rows],
        "jaccard": [v.jaccard for v in rows],
        "from_index": [v.from_index for v in rows],
    }
    write_parquet(path, pa.table(columns, schema=_SCHEMA))
