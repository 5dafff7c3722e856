"""From the sweep's measurements to a table of choices: rules by shape, for one device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fastrank.bench.tune_points import STEPS, Point
from fastrank.kernels.lowrank.choices import Table
from fastrank.kernels.lowrank.choices_file import SMALL_SHARED
from fastrank.kernels.lowrank.tiles import shared_bytes, tile_type

# a route other than the one that ships must win by more than the clock's noise
_MARGIN = 0.99
_SHIPS = {"forward": "vendor", "dx": "vendor", "dx_any": "vendor", "dual-route": "two_reads"}

Measured = Mapping[Point, Mapping[str, float]]  # candidate -> median seconds


def entry(measured: Measured, shipped: Table) -> dict:
    """One device's part of a table. A list of tiles ends with one that `shipped` has, if small."""
    tiles: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    by_kernel: dict[tuple[str, str, int], dict[Point, dict[str, float]]] = defaultdict(dict)
    for point, seconds in measured.items():
        if point.kind == "dual-route":
            continue
        for kernel in _kernels(point.kind):
            block_r = min(point.R, 32) if point.kind in STEPS else point.R
            found = {name: s for name, s in seconds.items() if name != "vendor"}
            if found:
                by_kernel[kernel, point.operands, block_r][point] = found
    for (kernel, operands, block_r), several in sorted(by_kernel.items()):
        rules = _tile_rules(several)
        small = _small(kernel, operands, block_r, rules, shipped)
        tiles[kernel][operands][str(block_r)] = rules + small
    routes: dict[str, Any] = defaultdict(dict)
    for step in _SHIPS:
        for operands in ("half", "tf32", "mixed"):
            several = {
                p: s for p, s in measured.items() if p.kind == step and p.operands == operands
            }
            if several:
                name = "dual" if step == "dual-route" else step
                routes[name][operands] = _route_rules(step, several)
    return {"tiles": {k: dict(v) for k, v in tiles.items()}, "routes": dict(routes)}


def _kernels(kind: str) -> tuple[str, ...]:
    """Whose tiles a point tells of; forward and dx share the plain gemm's."""
    return {"forward": ("gemm",), "dx": ("gemm",), "dx_any": ("gemm_any",)}.get(kind, (kind,))


def _rows_limit(M: int, every: Iterable[int]) -> int | None:
    """Half way, on a logarithmic scale, to the next larger M that was measured."""
    larger = [m for m in every if m > M]
    return None if not larger else 1 << round(math.log2(math.sqrt(M * min(larger))))


def _limits(point: Point, every: Iterable[Point]) -> dict[str, int]:
    rows = _rows_limit(point.M, {p.M for p in every})
    found = {} if rows is None else {"M": rows}
    if point.C:
        found["W"] = 1 << (point.W - 1).bit_length()
        found["C"] = 1 << (point.C - 1).bit_length()
    return found


def _tile_rules(measured: dict[Point, dict[str, float]]) -> list[dict]:
    """For each shape its fastest tile; for the rest the one with the least mean of log time."""
    groups: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point, seconds in measured.items():
        limits = tuple(sorted(_limits(point, measured).items()))
        for name, s in seconds.items():
            groups[limits][name].append(math.log(s))
    rules = []
    for limits in sorted(groups, key=_narrow_first):
        rules.append(dict(limits) | {"tile": _numbers(_fastest(groups[limits]))})
    overall: dict[str, list[float]] = defaultdict(list)
    for seconds in measured.values():
        best = min(seconds.values())
        for name, s in seconds.items():
            overall[name].append(math.log(s / best))
    rules.append({"tile": _numbers(_fastest(overall))})
    return _without_repeats(rules, "tile")


def _fastest(logs: Mapping[str, list[float]]) -> str:
    """Least mean among the names that every point of the group has."""
    most = max(len(values) for values in logs.values())
    complete = {n: sum(v) for n, v in logs.items() if len(v) == most}
    return min(complete, key=complete.__getitem__)


def _narrow_first(limits: tuple) -> tuple:
    """Rules apply up to their limits, so the narrower ones come first."""
    known = dict(limits)
    return tuple(known.get(name, 1 << 62) for name in ("R", "M", "W", "C"))


def _numbers(name: str) -> list[int]:
    return [int(n) for n in name.split("x")]


def _without_repeats(rules: list[dict], value: str) -> list[dict]:
    """Rules in front of the last one that say the same as it say nothing."""
    while len(rules) > 1 and rules[-2][value] == rules[-1][value]:
        del rules[-2]
    return rules


def _small(
    kernel: str, operands: str, block_r: int, rules: list[dict], shipped: Table
) -> list[dict]:
    last = tile_type(kernel)(*rules[-1]["tile"])
    if shared_bytes(kernel, operands, block_r, last) <= SMALL_SHARED:
        return []
    fits = [
        tile
        for k, o, _, tile in shipped.tiles()
        if (k, o) == (kernel, operands)
        and shared_bytes(kernel, operands, block_r, tile) <= SMALL_SHARED
    ]
    return [{"tile": list(fits[-1])}]


def _route_rules(step: str, measured: dict[Point, dict[str, float]]) -> list[dict]:
    ships = _SHIPS[step]
    rules = []
    for point, seconds in measured.items():
        if ships not in seconds:
            continue
        others = [s for name, s in seconds.items() if name != ships]
        wins = bool(others) and min(others) < _MARGIN * seconds[ships]
        other = "one_read" if step == "dual-route" else "gemm"
        use = other if wins else ships
        rules.append({"R": point.R} | _limits(point, measured) | {"use": use})
    rules.sort(key=lambda rule: _narrow_first(tuple((k, v) for k, v in rule.items() if k != "use")))
    return _without_repeats([*rules, {"use": ships}], "use")
