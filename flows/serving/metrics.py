"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SPEEDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)


class Histogram:
    """Counts of observations by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """Cumulative buckets, sum and count."""
        seen = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{le="{bound}"}} {seen}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {seen}"


class Metrics:
    """Figures of the server; those of the engine are read from it when they are asked for."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """By endpoint and by how a request ended."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token = Histogram(_SECONDS)
        self.speed = Histogram(_SPEEDS)

    def text(self, gauges: Mapping[str, int], totals: Mapping[str, int]) -> str:
        """The exposition; `gauges` and `totals` of the engine are told under their own names."""
        name = "headwater_requests_total"
        lines = [f"# HELP {name} Requests by endpoint and outcome.", f"# TYPE {name} counter"]
        for (endpoint, outcome), count in sorted(self.outcomes.items()):
            lines.append(f'{name}{{endpoint="{endpoint}",outcome="{outcome}"}} {count}')
        own = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        for key, value in {**own, **totals}.items():
            name = f"headwater_{key}_total"
            lines += [f"# HELP {name} {_HELP[key]}", f"# TYPE {name} counter", f"{name} {value}"]
        for key, value in gauges.items():
            name = f"headwater_{key}"
            lines += [f"# HELP {name} {_HELP[key]}", f"# TYPE {name} gauge", f"{name} {value}"]
        for key, histogram in (
            ("time_to_first_token_seconds", self.first_token),
            ("tokens_per_second", self.speed),
        ):
            name = f"headwater_{key}"
            lines += [f"# HELP {name} {_HELP[key]}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"


_HELP = {
    "prompt_tokens": "Tokens of the prompts that were admitted.",
    "completion_tokens": "Tokens made and delivered.",
    "reused_tokens": "Prompt tokens whose latents were there already.",
    "drafted_tokens": "Tokens proposed by speculative drafts.",
    "accepted_tokens": "Drafted tokens that were kept.",
    "steps": "Steps of the engine.",
    "preemptions": "Sequences that had to give their pages back and were read again.",
    "running": "Sequences in the batch.",
    "waiting": "Sequences that wait for a place in the batch.",
    "pages_used": "Pages of the cache in use.",
    "pages": "Pages of the cache.",
    "time_to_first_token_seconds": "From a request's admission to its first token.",
    "tokens_per_second": "Speed of one sequence after its first token.",
}
