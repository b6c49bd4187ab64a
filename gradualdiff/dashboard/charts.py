"""Charts as numbers for an SVG: where lines, bars and ticks go. Drawn on the server, in no script.

x is the round and y the value, in user units of a box of WIDTH by HEIGHT whose origin is its top
left. Colours are the style sheet's, by place: eight that colour-blind people can tell apart, beside
dashes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 12.0, 28.0
TICKS = 5
COLOURS = 8
MOST_BARS = 60
MOST_DOTS = 60

Points = dict[int, float]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Line:
    """``kind``: the style sheet's name of it. ``points``: as SVG writes them. ``dots``: x and y."""

    name: str
    kind: str
    points: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One piece of a stack."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Chart:
    """``said``: the chart in words, for whoever does not see it. Ticks: place and text."""

    title: str
    unit: str
    said: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    band: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)


def line_chart(
    title: str,
    unit: str,
    lines: Mapping[str, Points],
    *,
    bold: str = "",
    band: tuple[Points, Points] | None = None,
) -> Chart | None:
    """Lines by name over rounds; None where no point is known.

    ``bold``: the line that matters. ``band``: the least and the most at each round.
    """
    lines = {name: _finite(points) for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    values = [value for points in lines.values() for value in points.values()]
    low, high = (_finite(band[0]), _finite(band[1])) if band else ({}, {})
    values += [*low.values(), *high.values()]
    if not values or not lines:
        return None
    rounds = [number for points in lines.values() for number in points]
    scale = _Scale(min(rounds), max(rounds), min(values), max(values))
    others = iter(range(1, COLOURS * len(lines) + 1))
    drawn, legend = [], []
    for name, points in lines.items():
        kind = "bold" if name == bold else f"c{next(others) % COLOURS}"
        places = [(scale.x(number), scale.y(points[number])) for number in sorted(points)]
        dots = places if len(places) <= MOST_DOTS else []
        drawn.append(Line(name, kind, _path(places), dots))
        legend.append((kind, name))
    both = sorted(low.keys() & high.keys())
    there = [(scale.x(n), scale.y(high[n])) for n in both]
    back = [(scale.x(n), scale.y(low[n])) for n in reversed(both)]
    if both:
        legend.append(("band", "least and most of the sites"))
    told = "; ".join(f"{name}: {_from_to(points)}" for name, points in [*lines.items()][:COLOURS])
    return Chart(
        title=title,
        unit=unit,
        said=f"{title} in {unit} by round. {told}",
        x_ticks=scale.x_ticks(),
        y_ticks=scale.y_ticks(),
        lines=drawn,
        band=_path(there + back) if both else "",
        legend=legend,
    )


def bar_chart(title: str, unit: str, stacks: Mapping[int, Mapping[str, float]]) -> Chart | None:
    """Stacked bars, one a round, of the last rounds where they are many; None without any."""
    shown = dict(sorted(stacks.items())[-MOST_BARS:])
    shown = {n: {k: v for k, v in _finite(s).items() if v > 0} for n, s in shown.items()}
    names = list(dict.fromkeys(name for stack in shown.values() for name in stack))
    totals = [sum(stack.values()) for stack in shown.values()]
    if not names:
        return None
    first, last = min(shown), max(shown)
    scale = _Scale(first - 0.5, last + 0.5, 0.0, max(totals))
    width = max((scale.x(1) - scale.x(0)) * 0.8, 1.0)
    bars = []
    for number, stack in shown.items():
        under = 0.0
        for name in names:
            value = stack.get(name)
            if value is None:
                continue
            top, foot = scale.y(under + value), scale.y(under)
            kind = f"c{names.index(name) % COLOURS}"
            text = f"round {number}, {name}: {_short(value)} {unit}"
            bars.append(
                Bar(kind, round(scale.x(number) - width / 2, 1), top, width, foot - top, text)
            )
            under += value
    which = f"rounds {first} to {last}" if len(stacks) > len(shown) else "every round"
    return Chart(
        title=title,
        unit=unit,
        said=f"{title} in {unit}, {which}. The last: {_short(totals[-1])} {unit}",
        x_ticks=_Scale(first, last, 0, 1).over(scale),
        y_ticks=scale.y_ticks(),
        bars=bars,
        legend=[(f"c{index % COLOURS}", name) for index, name in enumerate(names)],
    )


class _Scale:
    """From rounds and values to places in the box."""

    def __init__(self, first: float, last: float, least: float, most: float) -> None:
        self._first, self._span = first, max(last - first, 1)
        step = _step(most - least or abs(most) or 1.0)
        self._step = step
        self._low = math.floor(least / step) * step
        self._high = max(math.ceil(most / step) * step, self._low + step)

    def x(self, number: float) -> float:
        """Where a round is."""
        inner = WIDTH - LEFT - RIGHT
        return round(LEFT + (number - self._first) / self._span * inner, 1)

    def y(self, value: float) -> float:
        """Where a value is."""
        inner = HEIGHT - TOP - BOTTOM
        return round(TOP + (self._high - value) / (self._high - self._low) * inner, 1)

    def x_ticks(self) -> list[tuple[float, str]]:
        """Whole rounds only."""
        return self.over(self)

    def over(self, places: _Scale) -> list[tuple[float, str]]:
        """The rounds of this scale, where ``places`` has them."""
        step = max(int(_step(self._span)), 1)
        first = math.ceil(self._first / step) * step
        last = int(self._first + self._span)
        return [(places.x(number), str(number)) for number in range(first, last + 1, step)]

    def y_ticks(self) -> list[tuple[float, str]]:
        """Each step from below the least to above the most."""
        count = round((self._high - self._low) / self._step)
        values = [self._low + index * self._step for index in range(count + 1)]
        return [(self.y(value), _short(value)) for value in values]


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, a few of which make up ``span``."""
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)


def _finite(points: Mapping[Key, float]) -> dict[Key, float]:
    return {key: value for key, value in points.items() if math.isfinite(value)}


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _from_to(points: Points) -> str:
    first, last = min(points), max(points)
    if first == last:
        return f"{_short(points[first])} in round {first}"
    return f"{_short(points[first])} in round {first}, {_short(points[last])} in round {last}"
