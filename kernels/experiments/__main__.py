"""The two arithmetic experiments behind the FP8 recipe: outliers and accumulation.

    python -m kernels.experiments [--only outliers|accumulation] [--folder FOLDER]

Both run on a CPU in seconds. FOLDER gets NAME.json and, where matplotlib is installed, NAME.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.experiments import accumulation, outliers
from kernels.figures import show, write

EXPERIMENTS = {"outliers": outliers, "accumulation": accumulation}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.experiments", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", choices=tuple(EXPERIMENTS), help="one of them alone")
    parser.add_argument("--folder", type=Path, help="write figures and plots to this folder too")
    given = parser.parse_args(arguments)
    for name, experiment in EXPERIMENTS.items():
        if given.only not in (None, name):
            continue
        losses = experiment.measure()
        print(show(experiment.rows(losses)))
        if given.folder:
            given.folder.mkdir(parents=True, exist_ok=True)
            write(given.folder / f"{name}.json", experiment.rows(losses))
            if importlib.util.find_spec("matplotlib"):
                experiment.plot(losses, given.folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
