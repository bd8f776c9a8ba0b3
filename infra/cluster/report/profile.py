"""Chapter: how much of a profiled step's communication was hidden."""

from __future__ import annotations

from pathlib import Path

from infra.cluster.pipeline.kernel_trace import summarise
from infra.cluster.report.chapter import Chapter, Table, figure


def profile_chapter(path: Path) -> Chapter:
    """A kernel trace of torch's profiler, of one GPU.

    Raises TraceError where the file is none.
    """
    found = summarise(path)
    rows = (
        figure("from the first kernel to the last", "ms", 1e3 * found.span),
        figure("computing", "ms", 1e3 * found.computation),
        figure("communicating", "ms", 1e3 * found.communication),
        figure("communication hidden behind computation", "%", 100 * found.hidden_share),
        figure("neither", "ms", 1e3 * found.idle),
    )
    classes = tuple((each.name, each.kernels, 1e3 * each.seconds) for each in found.classes)
    table = Table("Kernels by class; those side by side count each", ("class", "kernels", "ms"), classes)
    return Chapter(f"Profile {path.name}", rows, (table,))
