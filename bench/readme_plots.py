"""The figures that README shows, as SVG: the same bytes from the same records, on any machine.

Written by hand instead of by matplotlib, whose output changes with its version and the fonts that
are installed. Dots on horizontal lines; a vertical line marks "as fast as the baseline".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_COLOURS = ("#3b6fb6", "#c4572c", "#4d9a5b", "#8a5fa8")
_ROW, _TOP, _BOTTOM, _LEGEND = 22, 34, 44, 20
_STYLE = 'font-family="sans-serif" font-size="12" fill="#222"'

# a row's name -> series -> value
Panel = Mapping[str, Mapping[str, float]]


def dots(panels: Mapping[str, Panel], label: str, left: int = 150, width: int = 300) -> str:
    """Panels side by side, a line for each row, a dot for each series; every row in each panel.

    Args:
        panels: title -> what is shown; all of the same rows.
        label: of the horizontal axis, which begins at 0.
        left: pixels for the rows' names.
        width: pixels of a panel.
    """
    rows = list(next(iter(panels.values())))
    if any(list(panel) != rows for panel in panels.values()):
        raise ValueError("panels show different rows")
    series = list(dict.fromkeys(s for panel in panels.values() for r in panel.values() for s in r))
    values = [v for panel in panels.values() for r in panel.values() for v in r.values()]
    most = math.ceil(2 * max(values)) / 2
    height = _TOP + _ROW * len(rows) + _BOTTOM + _LEGEND
    whole = left + (width + 20) * len(panels)
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height}" '
        f'width="{whole}" height="{height}" {_STYLE}>',
        f'<rect width="{whole}" height="{height}" fill="#fff"/>',
    ]
    for i, row in enumerate(rows):
        found.append(_text(left - 8, _y(i) + 4, row, "end"))
    for place, (title, panel) in enumerate(panels.items()):
        found += _panel(left + (width + 20) * place, width, title, panel, series, most)
    middle = left + ((width + 20) * len(panels) - 20) / 2
    bottom = _TOP + _ROW * len(rows)
    found.append(_text(middle, bottom + 36, label, "middle"))
    found += _legend(left, bottom + 56, series, whole - left)
    return "\n".join([*found, "</svg>", ""])


def _panel(
    left: int, width: int, title: str, panel: Panel, series: Sequence[str], most: float
) -> list[str]:
    bottom = _TOP + _ROW * len(panel)
    found = [_text(left + width / 2, 18, title, "middle")]
    step = 0.5 if most <= 3 else 1.0
    for i in range(int(most / step) + 1):
        x = left + width * i * step / most
        colour = "#222" if i * step == 1.0 else "#ddd"
        found.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="{colour}"/>'
        )
        found.append(_text(x, bottom + 16, f"{i * step:g}", "middle"))
    for i, row in enumerate(panel.values()):
        for name, value in row.items():
            colour, x = _COLOURS[series.index(name) % len(_COLOURS)], left + width * value / most
            found.append(
                f'<circle cx="{x:.1f}" cy="{_y(i)}" r="4.5" fill="{colour}" fill-opacity="0.8"/>'
            )
    return found


def _legend(left: float, y: float, series: Sequence[str], width: float) -> list[str]:
    found = []
    for i, name in enumerate(series):
        x = left + width * i / len(series)
        colour = _COLOURS[i % len(_COLOURS)]
        found.append(f'<circle cx="{x:.1f}" cy="{y - 4}" r="4.5" fill="{colour}"/>')
        found.append(_text(x + 9, y, name, "start"))
    return found


def _y(row: int) -> float:
    return _TOP + _ROW * row + _ROW // 2


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
