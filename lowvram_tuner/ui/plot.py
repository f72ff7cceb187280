"""The loss plot: curves of bounded length, smoothed, drawn as a small SVG that does not jump while it grows.

A run may have ten thousand steps; a curve keeps at most `LIMIT` points by averaging neighbours in pairs whenever it is full,
so memory and drawing cost stay the same however long the run is. The x axis spans the whole run from its first step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

from lowvram_tuner.ui.words import number

LIMIT = 600  # points kept per curve
_WIDTH, _HEIGHT = 1000, 300  # user units; the SVG is stretched, lines keep their width, texts are HTML beside it


@dataclass
class Curve:
    """(step, value) pairs thinned to at most `LIMIT` points, each the mean of `stride` neighbours."""

    points: list[tuple[float, float]] = field(default_factory=list)
    stride: int = 1
    _open: list[tuple[float, float]] = field(default_factory=list)

    def add(self, step: float, value: float | None) -> None:
        """Takes one more value; what is not a finite number is left out, and a step taken back (a resume) cuts the curve."""
        if value is None or not math.isfinite(value):
            return
        if self.points and step <= self.points[-1][0]:
            self.points = [p for p in self.points if p[0] < step]
            self._open = []
        self._open = [p for p in self._open if p[0] < step]
        self._open.append((step, value))
        if len(self._open) >= self.stride:
            self.points.append(_mean(self._open))
            self._open = []
        if len(self.points) >= LIMIT:
            self.points = [_mean(self.points[i : i + 2]) for i in range(0, len(self.points), 2)]
            self.stride *= 2

    def all(self) -> list[tuple[float, float]]:
        """The points, the group not yet full included."""
        return [*self.points, _mean(self._open)] if self._open else list(self.points)


@dataclass(frozen=True)
class Series:
    """One line of a plot. `style` is its CSS class; `smooth` draws a running mean over a faint raw line."""

    label: str
    style: str
    points: list[tuple[float, float]]
    smooth: bool = False


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of each point with as many neighbours on either side, fewer towards the ends: it neither lags nor shifts."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    most, last, found = 2 + len(points) // 20, len(points) - 1, []
    for i, (step, _) in enumerate(points):
        half = min(most, i, last - i)
        found.append((step, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
    return found


def plot_html(series: list[Series], last_step: float = 0, empty: str = "The loss appears here once training starts.") -> str:
    """The plot with axes, labels and a legend that names the newest value of each line."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return f'<div class="plot empty"><p>{escape(empty)}</p></div>'
    left = 0.0
    right = max([last_step, *(s.points[-1][0] for s in drawn)])
    right = max(right, 1.0)
    low, high = _limits([v for s in drawn for _, v in s.points])
    lines = "".join(_line(s, left, right, low, high) for s in drawn)
    said = "Loss over steps. " + ". ".join(f"{s.label}: {number(_latest(s))} at step {s.points[-1][0]:.0f}" for s in drawn)
    return (
        f'<div class="plot" role="img" aria-label="{escape(said, quote=True)}">'
        f'<div class="keys">{"".join(_key(s) for s in drawn)}</div>'
        f'<div class="area"><div class="yaxis">{_y_labels(low, high)}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{_grid(low, high)}{lines}</svg></div>'
        f'<div class="xaxis"><span>step {left:,.0f}</span><span>{right:,.0f}</span></div></div>'
    )


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], sum(v for _, v in points) / len(points)


def _limits(values: list[float]) -> tuple[float, float]:
    """Round axis limits around the values, so that they seldom change; one wild value does not flatten the rest."""
    ordered = sorted(values)
    high, low = ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))], ordered[0]
    step = _round_step(max(high - low, abs(high) * 0.1, 1e-6))
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return (bottom, top) if top > bottom else (bottom, bottom + step)


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, about a quarter of the span."""
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def _ticks(low: float, high: float) -> list[float]:
    step = _round_step(high - low)
    count = int((high - low) / step + 1e-6)
    return [low + i * step for i in range(count + 1)]


def _line(s: Series, left: float, right: float, low: float, high: float) -> str:
    if not s.smooth:
        return _path(s.points, s.style, left, right, low, high)
    return _path(s.points, f"{s.style} raw", left, right, low, high) + _path(smoothed(s.points), s.style, left, right, low, high)


def _path(points: list[tuple[float, float]], style: str, left: float, right: float, low: float, high: float) -> str:
    def at(step: float, value: float) -> str:
        x = _WIDTH * (step - left) / (right - left)
        y = _HEIGHT * (1 - (min(max(value, low), high) - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    if len(points) == 1:
        points = [points[0], (points[0][0] + (right - left) * 0.004, points[0][1])]
    return f'<polyline class="line {escape(style)}" points="{" ".join(at(*p) for p in points)}"/>'


def _grid(low: float, high: float) -> str:
    ys = [_HEIGHT * (1 - (t - low) / (high - low)) for t in _ticks(low, high)]
    return "".join(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>' for y in ys)


def _y_labels(low: float, high: float) -> str:
    return "".join(f'<span style="bottom:{100 * (t - low) / (high - low):.1f}%">{t:.3g}</span>' for t in _ticks(low, high))


def _latest(s: Series) -> float:
    return (smoothed(s.points) if s.smooth else s.points)[-1][1]


def _key(s: Series) -> str:
    return f'<span class="key"><i class="stroke {escape(s.style)}"></i>{escape(s.label)} <b>{number(_latest(s))}</b></span>'
