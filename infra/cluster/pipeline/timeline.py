"""A replayed timeline as a picture: SVG by hand, PNG by matplotlib. One row a rank, one box a step, idle time
is what shows between the boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from math import floor, log10
from pathlib import Path

from infra.cluster.pipeline.replay import Event, Timeline
from infra.errors import ConfigError, HeadwaterError
from infra.files import atomic_path
from infra.parallel.actions import KINDS, PAIR, Action, Pair, Schedule, actions

COLOURS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "F": (("#2f6db3", "#ffffff"), ("#a8cbef", "#12324f")),
    "B": (("#2a8c5f", "#ffffff"), ("#a4dcbf", "#0e3d28")),
    "I": (("#8a9a2b", "#ffffff"), ("#d9e29a", "#3a420c")),
    "W": (("#d28a1e", "#ffffff"), ("#f5d6a0", "#573604")),
}
"""By kind, fill and figure; the paler is for micro-batches of the second direction, or on their way back."""
NEUTRAL = "#7d8590"
"""Text and ticks that are read on white and on black."""
IDLE_OPACITY = 0.16
ROW, GAP, LEFT, RIGHT, TOP, BOTTOM = 26, 3, 58, 52, 58, 26
"""Pixels: of a row, between rows, and around them."""
FONT = 10
DIGIT = 0.62
"""Width of a digit, in font sizes."""


@dataclass(frozen=True, slots=True)
class Box:
    """A drawn action, in pixels from the corner of its row. A pair is two, the forward above the backward."""

    kind: str
    paler: bool
    left: float
    width: float
    top: float
    height: float
    micro: int
    font: float
    """Size of the micro-batch's number, or 0 where the longest of them would not fit."""


@dataclass(frozen=True)
class Picture:
    """Where everything of a timeline lies. `width` is of the whole picture, in pixels."""

    timeline: Timeline
    width: int = 1400
    unit: str = "s"
    title: str = ""

    def __post_init__(self) -> None:
        if self.width < 2 * (LEFT + RIGHT):
            raise ConfigError(f"width: {self.width} pixels leave no room; use {2 * (LEFT + RIGHT)} or more")
        if not self.timeline.makespan > 0:
            raise ConfigError("timeline: nothing in it takes any time, so there is nothing to draw")

    @property
    def height(self) -> int:
        """Pixels of the whole picture."""
        return TOP + len(self.timeline.rows) * (ROW + GAP) + BOTTOM

    @property
    def scale(self) -> float:
        """Pixels for a second."""
        return (self.width - LEFT - RIGHT) / float(self.timeline.makespan)

    def row(self, rank: int) -> int:
        """Upper edge of a rank's row."""
        return TOP + rank * (ROW + GAP)

    def boxes(self, event: Event) -> tuple[Box, ...]:
        """One box, or the two halves of a pair."""
        left, width = float(event.start) * self.scale, float(event.seconds) * self.scale
        # A hair between neighbours, but never the whole of a narrow box.
        width = max(width - 0.8, 0.7 * width)
        parts = actions(event.step)
        height = ROW / len(parts)
        font = min(FONT, height - 3)
        if len(str(self.timeline.schedule.micro_batches - 1)) * font * DIGIT + 2 > width:
            font = 0
        return tuple(
            Box(
                part.kind,
                self._paler(event.rank, part),
                left,
                width,
                number * height,
                height,
                part.micro,
                font,
            )
            for number, part in enumerate(parts)
        )

    def _paler(self, rank: int, action: Action) -> bool:
        schedule = self.timeline.schedule
        if len(schedule.homes) > 1:
            return schedule.direction(action.micro) > 0
        return schedule.held[rank].index(action.stage) > 0

    @property
    def headline(self) -> str:
        """What is drawn, in a line."""
        schedule, timeline = self.timeline.schedule, self.timeline
        idle = sum(timeline.bubbles) / len(timeline.rows) / timeline.makespan
        return (
            f"{self.title or schedule.name}: {schedule.stages} stages on {schedule.ranks} ranks, "
            f"{schedule.micro_batches} micro-batches, {self.time(timeline.makespan)}, {idle:.1%} idle"
        )

    def time(self, value: float) -> str:
        """A time in the picture's unit, to four digits."""
        return f"{float(value):.4g} {self.unit}".rstrip()

    @property
    def legend(self) -> list[tuple[tuple[str, ...], bool, str]]:
        """(kinds drawn above one another, paler, what it is) of what the timeline holds."""
        steps = [event.step for row in self.timeline.rows for event in row]
        kinds = {step.kind for step in steps if isinstance(step, Action)}
        entries = [((kind,), False, name) for kind, name in KINDS.items() if kind in kinds]
        if any(isinstance(step, Pair) for step in steps):
            entries.append((("F", "B"), False, "forward and backward overlapped"))
        paler = paler_means(self.timeline.schedule)
        return [*entries, (("F", "B"), True, paler)] if paler else entries

    def ticks(self) -> list[float]:
        """Round times along the axis, about one every 110 pixels."""
        step = nice(110 / self.scale)
        return [number * step for number in range(floor(float(self.timeline.makespan) / step) + 1)]


def paler_means(schedule: Schedule) -> str:
    """What the paler boxes of a schedule are; empty if it has none."""
    if len(schedule.homes) > 1:
        return f"entered at rank {schedule.homes[1][0]}"
    return "on the way back" if any(len(stages) > 1 for stages in schedule.held) else ""


def nice(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def told(event: Event, picture: Picture) -> str:
    """A step in words, for the reader who points at it."""
    step = event.step
    if isinstance(step, Pair):
        forward, backward = step.forward, step.backward
        what = (
            f"{PAIR} forward of {forward.micro}, stage {forward.stage}; "
            f"backward of {backward.micro}, stage {backward.stage}"
        )
    else:
        what = f"{step.kind} {step.micro}, stage {step.stage}"
    exposed = f", {picture.time(event.exposed)} exposed" if event.exposed else ""
    return f"{what}: {picture.time(event.start)} to {picture.time(event.end)}{exposed}"


def svg(timeline: Timeline, width: int = 1400, unit: str = "s", title: str = "") -> str:
    """The timeline as an SVG document of `width` pixels, on no background of its own.

    Times are told in `unit`; `title` stands for the schedule's name in the headline.

    Raises:
        ConfigError: `width` leaves no room, or nothing takes any time.
    """
    return "\n".join(_svg_lines(Picture(timeline, width, unit, title))) + "\n"


def _svg_lines(picture: Picture) -> Iterator[str]:
    width, height = picture.width, picture.height
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="system-ui,sans-serif" font-size="{FONT + 1}">'
    )
    yield f"<title>{escape(picture.headline)}</title>"
    yield f"<style>{_style()}</style>"
    yield f'<text class="n h" x="{LEFT}" y="18">{escape(picture.headline)}</text>'
    yield from _svg_legend(picture)
    for rank, row in enumerate(picture.timeline.rows):
        yield f'<g transform="translate({LEFT} {picture.row(rank)})">'
        middle = ROW / 2 + 4
        yield f'<text class="n e" x="-8" y="{middle:g}">rank {rank}</text>'
        inner = width - LEFT - RIGHT
        idle = picture.timeline.bubbles[rank] / picture.timeline.makespan
        yield f'<path class="idle" d="M0 0h{inner}v{ROW}h-{inner}z"/>'
        yield f'<text class="n" x="{inner + 8}" y="{middle:g}">{idle:.1%}</text>'
        for event in row:
            yield _svg_step(picture, event)
        yield "</g>"
    floor_ = picture.row(len(picture.timeline.rows))
    for tick in picture.ticks():
        x = _round(LEFT + tick * picture.scale)
        yield f'<path class="tick" d="M{x} {floor_}v4"/>'
        yield f'<text class="n m" x="{x}" y="{floor_ + 16}">{tick:g}</text>'
    yield f'<text class="n" x="{width - RIGHT + 8}" y="{floor_ + 16}">{escape(picture.unit)}</text>'
    yield f'<text class="n" x="{width - RIGHT + 8}" y="{TOP - 8}">idle</text>'
    yield "</svg>"


def _svg_legend(picture: Picture) -> Iterator[str]:
    left = LEFT
    for kinds, paler, name in picture.legend:
        height = 12 / len(kinds)
        for number, kind in enumerate(kinds):
            top = 30 + number * height
            yield f'<path class="{_class(kind, paler)}" d="{_rectangle(left, top, 18, height)}"/>'
        yield f'<text class="n" x="{left + 24}" y="40">{escape(name)}</text>'
        left += 42 + round(len(name) * 6.1)


def _svg_step(picture: Picture, event: Event) -> str:
    parts = [f"<g><title>{escape(told(event, picture))}</title>"]
    for box in picture.boxes(event):
        name = _class(box.kind, box.paler)
        parts.append(f'<path class="{name}" d="{_rectangle(box.left, box.top, box.width, box.height)}"/>')
        if box.font:
            x, y = _round(box.left + box.width / 2), _round(box.top + box.height / 2 + 0.36 * box.font)
            parts.append(f'<text class="{name}t" x="{x}" y="{y}">{box.micro}</text>')
    return "".join(parts) + "</g>"


def _style() -> str:
    rules = [
        f".n{{fill:{NEUTRAL}}}.h{{font-weight:600;font-size:13px}}.e{{text-anchor:end}}.m{{text-anchor:middle}}",
        f".idle{{fill:{NEUTRAL};fill-opacity:{IDLE_OPACITY}}}.tick{{stroke:{NEUTRAL}}}",
    ]
    for kind, shades in COLOURS.items():
        for paler, (fill, figure) in enumerate(shades):
            name = _class(kind, bool(paler))
            rules.append(
                f".{name}{{fill:{fill}}}.{name}t{{fill:{figure};text-anchor:middle;font-size:{FONT}px}}"
            )
    return "".join(rules)


def _class(kind: str, paler: bool) -> str:
    return kind.lower() + ("2" if paler else "")


def _rectangle(left: float, top: float, width: float, height: float) -> str:
    wide = _round(width)
    return f"M{_round(left)} {_round(top)}h{wide}v{_round(height)}h-{wide}z"


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def png(
    timeline: Timeline, path: Path, width: int = 1400, unit: str = "s", title: str = "", scale: float = 2
) -> None:
    """Draw what `svg` draws into a PNG file, `width` times `scale` pixels wide, on white.

    Folders that are missing are made; the file is there whole or as it was before.

    Raises:
        ConfigError: `width` leaves no room, or nothing takes any time.
        HeadwaterError: The file cannot be written.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    picture = Picture(timeline, width, unit, title)
    figure = Figure(figsize=(width / 72, picture.height / 72), dpi=72 * scale)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(picture.height, 0))
    axes.axis("off")
    shapes: dict[str, list[list[tuple[float, float]]]] = {}

    def rectangle(colour: str, left: float, top: float, wide: float, high: float) -> None:
        right, low = left + wide, top + high
        shapes.setdefault(colour, []).append([(left, top), (right, top), (right, low), (left, low)])

    def text(x: float, y: float, words: str, size: float, colour: str = NEUTRAL, **more: str) -> None:
        # Dollars would be mathematics.
        axes.text(x, y, words.replace("$", r"\$"), fontsize=size, color=colour, va="center_baseline", **more)

    text(LEFT, 14, picture.headline, 13, weight="bold")
    left = float(LEFT)
    for kinds, paler, name in picture.legend:
        for number, kind in enumerate(kinds):
            high = 12 / len(kinds)
            rectangle(COLOURS[kind][paler][0], left, 30 + number * high, 18, high)
        text(left + 24, 36, name, FONT + 1)
        left += 42 + round(len(name) * 6.1)
    idle = [(LEFT, picture.row(rank)) for rank in range(len(timeline.rows))]
    inner = width - LEFT - RIGHT
    grounds = [[(x, y), (x + inner, y), (x + inner, y + ROW), (x, y + ROW)] for x, y in idle]
    axes.add_collection(PolyCollection(grounds, facecolors=NEUTRAL, alpha=IDLE_OPACITY, linewidths=0))
    for rank, row in enumerate(timeline.rows):
        top = picture.row(rank)
        text(LEFT - 8, top + ROW / 2, f"rank {rank}", FONT + 1, ha="right")
        text(width - RIGHT + 8, top + ROW / 2, f"{timeline.bubbles[rank] / timeline.makespan:.1%}", FONT + 1)
        for event in row:
            for box in picture.boxes(event):
                fill, ink = COLOURS[box.kind][box.paler]
                rectangle(fill, LEFT + box.left, top + box.top, box.width, box.height)
                if box.font:
                    x, y = LEFT + box.left + box.width / 2, top + box.top + box.height / 2
                    text(x, y, str(box.micro), box.font, ink, ha="center")
    floor_ = picture.row(len(timeline.rows))
    for tick in picture.ticks():
        x = LEFT + tick * picture.scale
        axes.plot([x, x], [floor_, floor_ + 4], color=NEUTRAL, linewidth=1)
        text(x, floor_ + 13, f"{tick:g}", FONT + 1, ha="center")
    text(width - RIGHT + 8, floor_ + 13, unit, FONT + 1)
    text(width - RIGHT + 8, TOP - 12, "idle", FONT + 1)
    for colour, polygons in shapes.items():
        axes.add_collection(PolyCollection(polygons, facecolors=colour, linewidths=0))
    try:
        with atomic_path(path, points=None) as temporary:
            figure.savefig(temporary, format="png", facecolor="white")
    except OSError as error:
        raise HeadwaterError(f"{path}: cannot be written: {error.strerror or error}") from error
