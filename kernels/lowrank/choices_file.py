"""The form of a table of choices: parsing, checking, writing. choices.py says what it means."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fastrank.kernels.lowrank.tiles import OPERANDS, GemmTile, Tile, shared_bytes, tile_type

USES = {
    "forward": ("vendor", "gemm"),
    "forward_any": ("vendor", "gemm"),
    "dx": ("vendor", "gemm"),
    "dx_any": ("vendor", "gemm"),
    "dual": ("one_read", "two_reads"),
}
# every list of tiles ends with one that any device of the last ten years can hold
SMALL_SHARED = 48 << 10
LIMITS = ("M", "W", "C", "R")
_BLOCKS = ("16", "32", "64", "128")
_UNLIMITED = 64  # bits: no size is longer


class Rule(NamedTuple):
    """What applies up to limits, which are bit lengths of (limit - 1)."""

    limits: tuple[int, int, int, int]
    value: Any  # a tile or a route


def bits(size: int) -> int:
    return (size - 1).bit_length()


def _parse_rules(where: str, rules: Any, value_key: str, parse: Callable) -> list[Rule]:
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"{where} is {rules!r}; give a list of rules")
    parsed = []
    for i, rule in enumerate(rules):
        here = f"{where}[{i}]"
        known = {value_key, *LIMITS}
        if not isinstance(rule, dict) or value_key not in rule or not set(rule) <= known:
            raise ValueError(f"{here} is {rule!r}; give {value_key!r} and limits {LIMITS}")
        limits = []
        for name in LIMITS:
            most = rule.get(name)
            if most is not None and (type(most) is not int or most < 1 or most & (most - 1)):
                raise ValueError(f"{here}: {name} is {most!r}; limits are powers of two")
            limits.append(_UNLIMITED if most is None else bits(most))
        parsed.append(Rule(tuple(limits), parse(here, rule[value_key])))
    if set(parsed[-1].limits) != {_UNLIMITED}:
        raise ValueError(f"{where}: the last rule has limits; end with one that always applies")
    return parsed


def _parse_tile(kernel: str, here: str, numbers: Any) -> Tile | GemmTile:
    kind = tile_type(kernel)
    wanted = ", ".join(kind._fields)
    if not isinstance(numbers, list) or len(numbers) != len(kind._fields):
        raise ValueError(f"{here}: tile is {numbers!r}; give [{wanted}]")
    for name, value in zip(kind._fields, numbers, strict=True):
        whole = type(value) is int and (value > 0 or (kernel == "finish" and name == "block_m"))
        free = name in ("num_stages", "group_m")
        if not whole or (not free and value & (value - 1)):
            raise ValueError(f"{here}: {name} is {value!r}; give powers of two as [{wanted}]")
    tile = kind(*numbers)
    if kernel == "gemm" and tile.block_c > 64:
        raise ValueError(f"{here}: block_c is {tile.block_c}; at most 64, which C is a multiple of")
    return tile


def _only(where: str, found: Any, known: Any) -> None:
    if not isinstance(found, dict) or not set(found) <= set(known):
        wrong = sorted(set(found) - set(known)) if isinstance(found, dict) else found
        raise ValueError(f"{where}: unknown {wrong!r}; choose from {', '.join(known)}")


def parse_entry(where: str, entry: Any, last_fits: bool = True) -> dict:
    """One device's part of a table, checked; ValueError names what is wrong and where.

    last_fits: whether each list must end with a tile of at most SMALL_SHARED.
    """
    _only(where, entry, ("tiles", "routes"))
    parsed: dict = {"tiles": {}, "routes": {}}
    _only(f"{where}.tiles", entry.get("tiles", {}), OPERANDS)
    for kernel, by_operands in entry.get("tiles", {}).items():
        _only(f"{where}.tiles.{kernel}", by_operands, OPERANDS[kernel])
        for operands, by_block in by_operands.items():
            here = f"{where}.tiles.{kernel}.{operands}"
            if not isinstance(by_block, dict) or not by_block:
                raise ValueError(f"{here} is {by_block!r}; give BLOCK_R -> rules")
            found = {}
            for block_r, rules in by_block.items():
                if block_r not in _BLOCKS:
                    raise ValueError(
                        f"{here}: BLOCK_R is {block_r!r}; choose from {', '.join(_BLOCKS)}"
                    )
                found[int(block_r)] = _parse_rules(
                    f"{here}.{block_r}", rules, "tile", lambda h, t, k=kernel: _parse_tile(k, h, t)
                )
                last = found[int(block_r)][-1].value
                needed = shared_bytes(kernel, operands, int(block_r), last)
                if last_fits and needed > SMALL_SHARED:
                    raise ValueError(
                        f"{here}.{block_r}: the last tile, {list(last)}, may take {needed} bytes "
                        f"of shared memory; end with one of at most {SMALL_SHARED}"
                    )
            parsed["tiles"].setdefault(kernel, {})[operands] = found
    _only(f"{where}.routes", entry.get("routes", {}), USES)
    for step, by_operands in entry.get("routes", {}).items():
        kernel = "dual" if step == "dual" else "gemm"
        _only(f"{where}.routes.{step}", by_operands, OPERANDS[kernel])
        for operands, rules in by_operands.items():
            here = f"{where}.routes.{step}.{operands}"
            parsed["routes"].setdefault(step, {})[operands] = _parse_rules(
                here, rules, "use", lambda h, use, s=step: _parse_use(h, use, s)
            )
    return parsed


def _parse_use(here: str, use: Any, step: str) -> str:
    if use not in USES[step]:
        raise ValueError(f"{here}: use is {use!r}; choose one of {', '.join(USES[step])}")
    return use


def parse(found: Any, where: str = "choices") -> dict[str, dict]:
    """Device -> parsed entry of a whole table. ValueError for what is amiss or missing."""
    if not isinstance(found, dict) or not isinstance(found.get("devices"), dict):
        raise ValueError(f'{where} has no "devices"; see the head of choices.py for the form')
    devices = {d: parse_entry(f"{where}: {d}", entry) for d, entry in found["devices"].items()}
    for device in devices:
        if device != "default" and family(device) is None:
            raise ValueError(f"{where}: unknown device {device!r}; name it sm_NN or gfxNNN")
    default = devices.get("default")
    if default is None:
        raise ValueError(f'{where} has no "default" device')
    for kernel, operands in OPERANDS.items():
        for what in operands:
            if what not in default["tiles"].get(kernel, {}):
                raise ValueError(f"{where}: default has no tiles.{kernel}.{what}")
    for step in USES:
        for what in OPERANDS["dual" if step == "dual" else "gemm"]:
            if what not in default["routes"].get(step, {}):
                raise ValueError(f"{where}: default has no routes.{step}.{what}")
    return devices


def family(device: str) -> tuple[str, int] | None:
    """("sm_", 90), ("gfx9", 0x42) and the like: capabilities that one can stand in for another."""
    if re.fullmatch(r"sm_\d+", device):
        return "sm_", int(device[3:])
    # the last two are stepping, in hexadecimal; before them is the generation
    if re.fullmatch(r"gfx\d+[0-9a-f]{2}", device):
        return device[:-2], int(device[-2:], 16)
    return None


def dumps(value: Any, depth: int = 0) -> str:
    """A table as JSON, with each list of rules on one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    pad = " " * (depth + 1)
    lines = [f"{pad}{json.dumps(k)}: {dumps(v, depth + 1)}" for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
