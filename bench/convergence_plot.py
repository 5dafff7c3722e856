"""The convergence report's figure as SVG: the same bytes from the same record, on any machine.

A row of two panels for each dropout: losses over steps, smoothed over ten, and how far each is from
stock PEFT's, unsmoothed and on a logarithmic axis.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

_COLOURS = ("#3b6fb6", "#c4572c", "#4d9a5b", "#8a5fa8")
_GREY = "#8a8a8a"
_WIDTH, _HEIGHT, _LEFT, _GAP, _TOP, _BELOW = 400, 190, 58, 86, 34, 62
_SMOOTHED = 10
_LOG = (-8, 1)  # decades of the right panels


class Line(NamedTuple):
    """One curve: its value at steps 1, 2, ...; None leaves a gap."""

    label: str
    values: Sequence[float | None]
    colour: str
    width: float = 1.3
    opacity: float = 1.0


def figure(content: Mapping[str, Any]) -> str:
    """The whole figure."""
    entries = content["seeds"]
    dropouts = sorted({entry["dropout"] for entry in entries})
    width = _LEFT + 2 * _WIDTH + _GAP + 20
    height = (_TOP + _HEIGHT + _BELOW) * len(dropouts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for row, dropout in enumerate(dropouts):
        alike = [entry for entry in entries if entry["dropout"] == dropout]
        top = _TOP + (_TOP + _HEIGHT + _BELOW) * row
        title = f"training loss, dropout {dropout:g}"
        parts += _panel(_LEFT, top, title, _losses(alike), logarithmic=False)
        title = f"distance from stock PEFT's loss, dropout {dropout:g}"
        parts += _panel(_LEFT + _WIDTH + _GAP, top, title, _distances(alike), logarithmic=True)
    return "\n".join([*parts, "</svg>", ""])


def _losses(entries: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Stock PEFT's wide and pale, fastrank's thin on top of it."""
    found = []
    for entry, colour in zip(entries, _COLOURS * len(entries), strict=False):
        for variant, width, opacity in (("peft", 6.0, 0.3), ("fastrank", 1.3, 1.0)):
            losses = entry["variants"][variant]["losses"]
            starts = [max(0, i + 1 - _SMOOTHED) for i in range(len(losses))]
            smooth = [statistics.fmean(losses[s : i + 1]) for i, s in enumerate(starts)]
            label = f"{variant}, seed {entry['seed']}"
            found.append(Line(label, smooth, colour, width, opacity))
    return found


def _distances(entries: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Exactly equal losses have no place on a logarithmic axis."""
    found = []
    for entry, colour in zip(entries, _COLOURS * len(entries), strict=False):
        stock = entry["variants"]["peft"]["losses"]
        for variant in ("peft-again", "fastrank"):
            if variant in entry["variants"]:
                losses = entry["variants"][variant]["losses"]
                far = [abs(a - b) or None for a, b in zip(losses, stock, strict=True)]
                label = f"{variant}, seed {entry['seed']}"
                found.append(Line(label, far, _GREY if variant == "peft-again" else colour))
    return found


def _panel(
    left: int, top: int, title: str, lines: Sequence[Line], *, logarithmic: bool
) -> list[str]:
    steps = max(len(line.values) for line in lines)
    most = max((v for line in lines for v in line.values if v is not None), default=1.0)
    low, high = _LOG if logarithmic else (0.0, math.ceil(2 * most) / 2)

    def place(step: float, value: float) -> tuple[float, float]:
        height = math.log10(value) if logarithmic else value
        share = min(max((height - low) / (high - low), 0.0), 1.0)
        return left + _WIDTH * step / steps, top + _HEIGHT * (1 - share)

    parts = [_text(left + _WIDTH / 2, top - 12, title, "middle")]
    ticks = [10.0**i for i in range(low, high + 1, 2)] if logarithmic else []
    if not logarithmic:
        ticks = [i / 2 for i in range(int(2 * high) + 1)]
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(
            f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(left - 8, y + 4, f"{tick:.0e}" if logarithmic else f"{tick:g}", "end"))
    for i in range(5):
        step = round(steps * i / 4)
        x = place(step, 1.0)[0]
        parts.append(_text(x, top + _HEIGHT + 16, f"{step}", "middle"))
    for line in lines:
        parts += _curve(line, place)
    for i, line in enumerate(lines):
        x, y = left + 146 * (i % 3), top + _HEIGHT + 34 + 16 * (i // 3)
        style = f'stroke="{line.colour}" stroke-width="{line.width}" opacity="{line.opacity}"'
        parts.append(f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" {style}/>')
        parts.append(_text(x + 21, y, line.label, "start"))
    return parts


def _curve(line: Line, place: Any) -> list[str]:
    """A polyline for each run of values."""
    runs: list[list[str]] = [[]]
    for step, value in enumerate(line.values, start=1):
        if value is None:
            runs.append([])
        else:
            x, y = place(step, value)
            runs[-1].append(f"{x:.1f},{y:.1f}")
    style = f'stroke="{line.colour}" stroke-width="{line.width}" opacity="{line.opacity}"'
    found = []
    for run in runs:
        if len(run) > 1:
            found.append(f'<polyline points="{" ".join(run)}" fill="none" {style}/>')
        elif run:
            x, y = run[0].split(",")
            found.append(f'<circle cx="{x}" cy="{y}" r="1" fill="{line.colour}"/>')
    return found


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
