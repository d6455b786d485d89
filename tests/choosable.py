"""Entries of a table, for tests of Choice."""

from __future__ import annotations

from typing import Any, Literal

from moe.choice import Choice

SHAPES = {
    "dot": "tests.choosable:Dot",
    "box": "tests.choosable:Box",
    "frame": "tests.choosable:Frame",
    "missing": "tests.choosable_but_absent:Nothing",
}
Shape = Choice(SHAPES, "shape", given=("canvas",), default="dot")


class Dot:
    def __init__(self, canvas: Any, *, copy: int = 1, limit: float = float("inf"), at: tuple[float, float] = (0.0, 0.5)) -> None: ...


class Box:
    def __init__(self, canvas: Any, *, width: int, colour: Literal["red", "blue"] = "red") -> None: ...


class Frame:
    def __init__(self, canvas: Any, *, inner: Shape = "dot", title: str | None = None) -> None: ...
