"""Train the same small model in FP8 and in BF16, with controls that show what noise alone does.

    python -m model.precision_study --folder FOLDER [--size small|medium] [--seeds N] [--device auto|cpu|cuda]

FOLDER gets precision_runs.jsonl, a line a finished run, from which a study that was stopped goes on;
precision.json, the figures, written anew after every run; and in the end precision.png where matplotlib is
installed. `small` takes about a quarter of an hour a seed on a CPU core; `medium`, 100M parameters, is for a
GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.errors import HeadwaterError
from kernels.figures import show, write
from model.device import pick_device
from model.precision_study import report
from model.precision_study.collect import collect
from model.precision_study.runs import VARIANTS
from model.precision_study.setting import MEDIUM, SETTINGS, SMALL


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m model.precision_study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, required=True, help="where runs and figures are kept")
    parser.add_argument("--size", choices=tuple(SETTINGS), help="small on a CPU, medium on a GPU by default")
    parser.add_argument("--seeds", type=int, default=4, help="how many seeds")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args(arguments)
    try:
        device = pick_device(given.device)
        setting = SETTINGS[given.size] if given.size else MEDIUM if device.type == "cuda" else SMALL
        runs: list[dict[str, Any]] = []
        for run in collect(
            given.folder / "precision_runs.jsonl", setting, range(given.seeds), given.variants, device
        ):
            runs.append(run)
            print(
                f"{run['variant']:<18} seed {run['seed']}: held-out loss {run['held_out']:.4f} in "
                f"{run['seconds']:.0f} s",
                flush=True,
            )
            write(given.folder / "precision.json", report.rows(runs))
    except HeadwaterError as error:
        print(f"precision_study: {error}", file=sys.stderr)
        return 1
    print(show(report.rows(runs)))
    if importlib.util.find_spec("matplotlib"):
        report.plot(runs, given.folder / "precision.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
