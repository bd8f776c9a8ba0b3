"""Time training and generation beside transformers' DeepseekV3 with the same weights, and beside the
machine's limit.

    python -m model.bench [--json FILE] [--only train|generate]

The limit of a training step is the time that its matrix products alone take: each is timed at its own shape,
type and number of threads, forward and both ways back. Peers run in turns with ours, so that all meet the
same machine; times are medians. Memory is what the step's tensors take beyond weights, gradients and
optimizer state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.figures import Row, show, write
from model.bench.generation import generation
from model.bench.training import training


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--only", choices=("train", "generate"), help="one part alone")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    if given.only != "generate":
        rows += training(given.rounds, torch.get_num_threads())
    if given.only != "train":
        rows += generation(given.rounds)
    print(show(rows))
    if given.json:
        write(given.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
