"""The file of finished runs: one JSON line each, added when the run ends, so that a study goes on where it
was stopped. The first line says what all of them were made with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from infra.errors import HeadwaterError
from kernels.figures import machine
from model.precision_study.emulation import WideProducts
from model.precision_study.runs import VARIANTS, one_run
from model.precision_study.setting import Setting
from model.precision_study.text import standard_library


def collect(
    file: Path,
    setting: Setting,
    seeds: Iterable[int],
    variants: Sequence[str],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """All runs of `seeds` and `variants`: those that `file` holds first, then the missing ones, each made and
    added to the file when it is asked for.

    Seeds come one after the other, so that a study that is cut short has whole ones; runs in another order of
    the data come last.

    Raises:
        HeadwaterError: `file` holds runs of another setting, text or machine; a run diverged.
    """
    text = standard_library(setting.text_bytes)
    # As JSON gives it back, so that it can be compared.
    header = json.loads(
        json.dumps(
            {
                "setting": asdict(setting),
                "text": hashlib.sha256(text).hexdigest(),
                "machine": machine(),
                "device": device.type,
            }
        )
    )
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(header) + "\n", encoding="utf-8")
    found, runs = read(file)
    if unlike := [key for key in header if header[key] != found.get(key)]:
        raise HeadwaterError(
            f"{file} holds runs of another {' and '.join(unlike)}, which cannot be compared with runs made "
            "here: name another file"
        )
    pairs = [(variant, seed) for seed in seeds for variant in variants]
    pairs.sort(key=lambda pair: VARIANTS[pair[0]].order)
    done = {(run["variant"], run["seed"]): run for run in runs}
    yield from (done[pair] for pair in pairs if pair in done)
    for variant, seed in (pair for pair in pairs if pair not in done):
        with WideProducts() if device.type == "cpu" else nullcontext():
            run = one_run(setting, variant, seed, text, device)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(run) + "\n")
        yield run


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the runs of `file` were made with, and the runs. A last line that was torn is cut off.

    Raises:
        HeadwaterError: `file` is no such file.
    """
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        file.write_bytes(kept)
    try:
        header, *runs = [json.loads(line) for line in kept.splitlines()]
        if "setting" not in header or not all("losses" in run for run in runs):
            raise ValueError("fields are missing")
    except ValueError as error:
        raise HeadwaterError(f"{file} is no file of runs ({error}): name another file") from error
    return header, runs
