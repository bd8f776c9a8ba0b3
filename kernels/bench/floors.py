"""What each kernel must move and multiply at least, and how long a GPU needs for that: Markdown, no GPU used.

python -m kernels.bench.floors [--json FILE]

One shape of DeepSeek-V3 a kernel, the first that is timed. Bytes count each input read once and each output
written once. The floor is the longer of two times: of the bytes at the bandwidth, and of the products at the
rate, that an H200's data sheet gives. It is arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernels.bench import entries
from kernels.bench.entry import Entry
from kernels.figures import Row, write

BANDWIDTH = 4.8e12  # bytes a second
RATES = {"FP8": 1979e12, "BF16": 989.5e12}  # products and sums a second, dense
IN_BF16 = ("mla_attention", "mla_decode", "linear_cross_entropy")
HEAD = "| kernel | shape | MB | GFLOP | floor, µs | set by |\n| --- | --- | ---: | ---: | ---: | --- |"


def floor(entry: Entry) -> tuple[float, float]:
    """Seconds that the first timed shape of an entry needs for its bytes, and for its products."""
    sizes = entry.timed[0].sizes
    rate = RATES["BF16" if entry.name in IN_BF16 else "FP8"]
    return entry.moved(*sizes) / BANDWIDTH, entry.flops(*sizes) / rate


def markdown() -> str:
    """The table of all timed entries."""
    lines = [HEAD]
    for entry in entries():
        if entry.timed:
            shape = entry.timed[0]
            memory, products = floor(entry)
            moved, flops = entry.moved(*shape.sizes) / 1e6, entry.flops(*shape.sizes) / 1e9
            by = "products" if products > memory else "bytes"
            work = f"{flops:,.0f}" if flops else ""
            lines.append(
                f"| {entry} | {shape} | {moved:,.0f} | {work} | {1e6 * max(memory, products):,.0f} | {by} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.floors", description="Bytes and floors.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the floors to FILE")
    options = parser.parse_args(arguments)
    print(markdown())
    if options.json:
        timed = [entry for entry in entries() if entry.timed]
        write(options.json, [Row(f"{e} {e.timed[0]}: floor", "us", 1e6 * max(floor(e))) for e in timed])
    return 0


if __name__ == "__main__":
    sys.exit(main())
