"""Check the kernels against float64, or time them on the shapes of the model.

    python -m kernels.bench --check [--only NAME] [--seed N] [--json FILE]
    python -m kernels.bench [--sweep] [--only NAME] [--seed N] [--json FILE]

With --check every function of this folder that has a kernel is compared with an independent computation, and
on a GPU its bits with those of its reference. Otherwise the kernels are timed on a GPU, beside peers and
ceilings measured in the same run. On a CPU only the references run: their times say what emulating FP8 costs
there, and nothing about the kernels. Times are medians; peers run in turns with ours. With --sweep kernels
that can be launched in several shapes run in all of them: the best for each layer is printed, and all are
written to FILE.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from kernels.bench import entries
from kernels.bench.errors import check
from kernels.bench.sweep import sweep_gpu
from kernels.bench.table import by_case, line
from kernels.bench.times import time_cpu, time_gpu
from kernels.figures import Row, show, write


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 1 if a limit of --check is broken or a kernel fails; a missed goal is printed."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description="Check or time every kernel of this folder."
    )
    parser.add_argument("--check", action="store_true", help="errors against float64, and no times")
    parser.add_argument("--sweep", action="store_true", help="on a GPU: every launch shape, and the best")
    parser.add_argument("--only", metavar="NAME", help="one family or one function alone")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random inputs; another one every time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    try:
        chosen = entries(options.only)
    except ValueError as error:
        parser.error(str(error))
    seed = torch.seed() % 2**31 if options.seed is None else options.seed
    print(f"seed {seed}")
    on_gpu = torch.cuda.is_available()
    if options.sweep and (options.check or not on_gpu):
        parser.error("--sweep times kernels on a GPU; there is none, or --check was given too")
    if not on_gpu:
        print("No CUDA device: the PyTorch references run here; the Triton kernels are not run.")
    rows: list[Row] = []
    if options.check:
        for row in check(chosen, torch.device("cuda" if on_gpu else "cpu"), seed):
            print(show([row]), flush=True)
            rows.append(row)
    else:
        timed = sweep_gpu if options.sweep else time_gpu if on_gpu else time_cpu
        for found in timed(chosen, seed):
            _print(found, options.sweep)
            rows += found
        _print_missing(rows)
    if options.json:
        write(options.json, rows)
    return _summary(rows, options.check)


def _print(rows: list[Row], sweep: bool) -> None:
    """A timed case as one line, other rows each as its own; of a sweep the best, and what failed."""
    cases = by_case(rows)
    for name, found in cases.items():
        print(line(name, found), flush=True)
    for row in rows:
        if row.name not in cases and not (sweep and row.ratio is None and row.holds is None):
            print(show([row]), flush=True)


def _print_missing(rows: list[Row]) -> None:
    """Peers that could not be compared with, each once."""
    missing: dict[str, int] = {}
    for row in rows:
        if row.peer_name is not None and row.peer is None:
            missing[row.peer_name] = missing.get(row.peer_name, 0) + 1
    for name, count in missing.items():
        print(f"{name}: {count} cases without this comparison")


def _summary(rows: list[Row], checked: bool) -> int:
    failed = [row for row in rows if row.holds is False and (checked or row.goal is None)]
    missed = [row for row in rows if row.holds is False and row not in failed]
    held = sum(row.holds is True for row in rows)
    word = "limits" if checked else "goals"
    print(f"{held} {word} hold, {len(missed)} goals are missed, {len(failed)} rows fail")
    for row in failed:
        print(f"failed: {row.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
