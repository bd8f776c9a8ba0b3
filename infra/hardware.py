"""What machine and which libraries a stage ran on. Never imports torch: it looks only where torch is loaded.

The *numerics class* is what bit-equality is promised within: device kind, thread count, layout, versions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from infra.files import sha256_file
from infra.imports import ROOT

# What decides the bytes of a payload, besides our own code.
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "numba",
    "safetensors",
    "pyarrow",
    "tokenizers",
    "datasets",
    "regex",
    "pydantic",
)


def available_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def thread_count() -> int:
    """Threads that numeric code of this process uses: torch's own count once loaded, else what OpenMP is
    told.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) > 0 else available_cores()


def gpus() -> list[str]:
    """Names of the CUDA devices, [] when torch is not loaded or sees none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


@functools.lru_cache(maxsize=1)
def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory in bytes, 0 if the system does not say."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


@functools.lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a payload's bytes; missing ones are left out."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def lock_digest(root: Path = ROOT) -> str:
    """SHA-256 of the constraints file beside the packages, "" when there is none (an installed copy)."""
    path = root / "constraints.txt"
    return sha256_file(path) if path.is_file() else ""


def device_kind(asked: str) -> str:
    """ "cuda" or "cpu": where a stage runs that was asked to run on `asked` ("" for one without a model)."""
    if asked in ("", "cpu"):
        return "cpu"
    import torch  # the stage is about to do so itself

    return "cuda" if torch.cuda.is_available() else "cpu"


def numerics_class(device: str = "", layout: str = "1") -> dict[str, Any]:
    """Device kind, threads, layout (ranks) and the versions that arithmetic depends on."""
    versions = package_versions()
    return {
        "device": device_kind(device),
        "threads": thread_count(),
        "layout": layout,
        "machine": platform.machine(),
        "versions": {name: versions[name] for name in ("torch", "triton", "numpy") if name in versions},
    }


def environment(device: str = "") -> dict[str, Any]:
    """The `environment` part of a record; `device` is what the stage was asked to run on, "" if it has no
    choice."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "lock": lock_digest(),
        "hardware": {
            "system": f"{platform.system()} {platform.release()}",
            "cpu": cpu_model(),
            "cores": available_cores(),
            "memory_bytes": memory_bytes(),
            "gpus": gpus(),
        },
        "numerics": numerics_class(device),
    }


def reset_peak_memory() -> None:
    """Start measuring this process's peak memory anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Largest resident size since `reset_peak_memory` (or since the process started), or of a finished
    child.
    """
    own = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                own = int(line.split()[1]) * 1024
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    if not own:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)


def cpu_seconds() -> float:
    """Processor seconds used so far by this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
