"""Figures as SVG that read on light and on dark pages, on a phone and on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from moe.pages.scale import Kind, Scale, scale, told

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 440, 320, 52, 16, 46, 50
EDGE = 6  # where words above the frame begin
LETTER = 6.6  # width of a letter of the legend, and what a line of it takes
LINE, HEAD = 18, 26
LIGHT = {"ink": "#1f2328", "soft": "#59636e", "grid": "#dfe3e8", "paper": "#ffffff"}
DARK = {"ink": "#e6edf3", "soft": "#9198a1", "grid": "#2d333b", "paper": "#0d1117"}
Point = tuple[float, float]
COLOURS = (  # on light, on dark; the first for what others are compared with
    ("#6e7781", "#9aa4ae"), ("#0b6fc7", "#58a6ff"), ("#178a4c", "#3fb96d"), ("#b36b00", "#e3a33a"), ("#c2412d", "#ff7b6b"),
    ("#8a45c9", "#bc8cff"), ("#0f8a8a", "#39c5cf"), ("#b03578", "#f778ba"),
)  # fmt: skip
DASHES = ("", "7 4", "2 4", "10 4 2 4")  # of lines, one for each turn through the colours
SHAPES: tuple[tuple[Point, ...], ...] = (  # corners around the middle, of size 1; a circle has none
    (), ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)), ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)), ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Marks of one name. `spans`: low and high end of a bar at each point; `words`: what a pointer is told of each."""

    name: str
    points: Sequence[Point]
    kind: Literal["line", "dots", "both", "band"] = "dots"
    colour: int = 0  # a style, of which there are as many as one asks for: colour, dash and shape change in turn
    hollow: bool = False
    dashed: bool = False
    spans: Sequence[Point] = ()  # of a band: its edges at each point
    words: Sequence[str] = ()
    size: float = 4.0
    legend: bool = True


@dataclass(frozen=True)
class Figure:
    """What is drawn, and what is said under it."""

    name: str  # of its file
    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    x: Kind = "linear"
    y: Kind = "linear"
    caption: str = ""
    xticks: Sequence[float] = field(default_factory=tuple)  # in place of round ones


def svg(figure: Figure, *, alone: bool = False, dark: bool | None = None) -> str:
    """The figure as SVG. alone: with its own style; dark: of one scheme, None for the reader's."""
    lines = _legend(figure)
    top = TOP - LINE + LINE * max(len(lines), 1)
    height = HEIGHT - TOP + top
    across, up = _scales(figure)
    frame = _Frame(across, up, top, height - BOTTOM)
    body = [*_axes(figure, frame), *_written(lines)]
    body += ['<g class="marks">', *(mark for one in figure.series for mark in _marks(one, frame)), "</g>"]
    head, above = [f"<title>{escape(figure.title)}</title>"], 0
    if alone:
        above = HEAD
        head += [f"<style>{style(dark)}</style>", f'<rect class="paper" width="{WIDTH}" height="{height + above}"/>']
        head.append(f'<text class="title" x="{EDGE}" y="20">{escape(figure.title)}</text>')
        body = [f'<g transform="translate(0 {above})">', *body, "</g>"]
    attributes = f'viewBox="0 0 {WIDTH} {height + above}" role="img" aria-label="{escape(figure.title, quote=True)}" class="figure"'
    if alone:
        attributes += f' xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height + above}"'
    return "\n".join([f"<svg {attributes}>", *head, *body, "</svg>"])


def style(dark: bool | None = None) -> str:
    """The rules that the marks' classes stand for, of one scheme or of the reader's."""
    rules = """
.figure text { font: 12px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif }
.figure .title { font-size: 14px; font-weight: 600 }
.figure .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.figure .dashed { stroke-dasharray: 5 4 }
.figure .bar { stroke-width: 1.4; stroke-opacity: .75 }
.figure .band { fill-opacity: .16; stroke: none }
.figure .edge { fill: none; stroke-width: 1 }
.figure .grid { stroke-width: 1 }
"""
    rules += "".join(f".figure .d{turn} {{ stroke-dasharray: {dash} }}\n" for turn, dash in enumerate(DASHES) if dash)
    rules += _colours(dark or False)
    return rules + (f"@media (prefers-color-scheme: dark) {{\n{_colours(True)}}}\n" if dark is None else "")


def _colours(dark: bool) -> str:
    """Written out, as programs that make pictures of SVG read no variables."""
    tone = DARK if dark else LIGHT
    tones = {"text": "ink", ".soft": "soft", ".paper": "paper"}
    rules = [f".figure {what} {{ fill: {tone[name]} }}" for what, name in tones.items()]
    rules += [f".figure .grid {{ stroke: {tone['grid']} }}", f".figure .edge {{ stroke: {tone['soft']} }}"]
    for number, pair in enumerate(COLOURS):
        colour = pair[dark]
        rules += [
            f".figure .s{number} {{ stroke: {colour} }}",
            f".figure .f{number} {{ fill: {colour}; stroke: {tone['paper']}; stroke-width: .8 }}",
            f".figure .h{number} {{ fill: {tone['paper']}; stroke: {colour}; stroke-width: 1.8 }}",
            f".figure .b{number} {{ fill: {colour} }}",
        ]
    return "\n".join(rules) + "\n"


@dataclass(frozen=True)
class _Frame:
    across: Scale
    up: Scale
    top: float
    floor: float

    def place(self, x: float, y: float) -> Point:
        return LEFT + self.across.share(x) * (WIDTH - RIGHT - LEFT), self.floor - self.up.share(y) * (self.floor - self.top)


def _scales(figure: Figure) -> tuple[Scale, Scale]:
    points = [point for one in figure.series for point in one.points]
    ends = [end for one in figure.series for span in one.spans for end in span]
    across = scale((x for x, _ in points), figure.x)
    if figure.xticks:
        across = across._replace(ticks=[tick for tick in figure.xticks if 0 <= across.share(tick) <= 1])
    return across, scale([*(y for _, y in points), *ends], figure.y)


def _axes(figure: Figure, frame: _Frame) -> Iterator[str]:
    right = WIDTH - RIGHT
    for tick in frame.up.ticks:
        _, y = frame.place(frame.across.low, tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="soft" text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{told(tick, frame.up.high)}</text>'
    for tick in frame.across.ticks:
        x, _ = frame.place(tick, frame.up.low)
        yield f'<line class="edge" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.floor}" y2="{frame.floor + 4}"/>'
        yield f'<text class="soft" text-anchor="middle" x="{x:.1f}" y="{frame.floor + 18}">{told(tick, frame.across.high)}</text>'
    yield f'<path class="edge" d="M{LEFT} {frame.top}V{frame.floor}H{right}"/>'
    yield f'<text class="soft" text-anchor="middle" x="{(LEFT + right) / 2}" y="{frame.floor + 38}">{escape(figure.xlabel)}</text>'
    yield f'<text class="soft" x="{EDGE}" y="16">{escape(figure.ylabel)}</text>'


def _legend(figure: Figure) -> list[list[tuple[float, Series]]]:
    """Lines of the legend: each series and where it begins."""
    lines: list[list[tuple[float, Series]]] = []
    x = math.inf
    for one in figure.series:
        if not (one.legend and one.name and one.points):
            continue
        width = 31 + LETTER * len(one.name)
        if x + width > WIDTH - RIGHT:
            lines.append([])
            x = float(EDGE)
        lines[-1].append((x, one))
        x += width
    return lines


def _written(lines: list[list[tuple[float, Series]]]) -> Iterator[str]:
    for number, line in enumerate(lines):
        y = 36 + LINE * number
        for x, one in line:
            if one.kind == "band":
                yield f'<rect class="band b{_tone(one.colour)}" x="{x}" y="{y - 9}" width="14" height="10"/>'
            if one.kind in ("line", "both"):
                yield f'<path class="{_drawn(one)}" d="M{x} {y - 4}h14"/>'
            if one.kind in ("dots", "both"):
                yield _dot(x + 7, y - 4, one, "")
            yield f'<text x="{x + 19}" y="{y}">{escape(one.name)}</text>'


def _tone(style: int) -> int:
    """The colour of a style: the first for itself, the others over and over."""
    return 1 + (style - 1) % (len(COLOURS) - 1) if style else 0


def _drawn(one: Series) -> str:
    """The classes of a line."""
    turn = max(one.colour - 1, 0) // (len(COLOURS) - 1) % len(DASHES)
    return f"line s{_tone(one.colour)}" + (" dashed" if one.dashed else f" d{turn}" if turn else "")


def _marks(one: Series, frame: _Frame) -> Iterator[str]:
    places = [frame.place(x, y) for x, y in one.points]
    if one.kind == "band":
        low = [frame.place(x, end) for (x, _), (end, _) in zip(one.points, one.spans, strict=True)]
        high = [frame.place(x, end) for (x, _), (_, end) in zip(one.points, one.spans, strict=True)]
        yield f'<path class="band b{_tone(one.colour)}" d="M{_joined([*low, *high[::-1]])}Z"/>'
        return
    for (x, _), (low, high) in zip(one.points, one.spans, strict=False):
        (left, bottom), (_, top) = frame.place(x, low), frame.place(x, high)
        yield f'<line class="bar s{_tone(one.colour)}" x1="{left:.1f}" x2="{left:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
    if one.kind in ("line", "both") and places:
        yield f'<path class="{_drawn(one)}" d="M{_joined(places)}"/>'
    if one.kind in ("dots", "both"):
        for number, (x, y) in enumerate(places):
            yield _dot(x, y, one, one.words[number] if one.words else "")


def _joined(places: Sequence[Point]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _dot(x: float, y: float, one: Series, words: str) -> str:
    r = one.size
    kind = f'class="dot {"h" if one.hollow else "f"}{_tone(one.colour)}"'
    title = f"<title>{escape(words)}</title>" if words else ""
    corners = SHAPES[one.colour % len(SHAPES)]
    if not corners:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{r}">{title}</circle>'
    return f'<path {kind} d="M{_joined([(x + r * dx, y + r * dy) for dx, dy in corners])}Z">{title}</path>'
