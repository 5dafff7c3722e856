"""Which route a call takes and which tile a kernel has: data, looked up by device and shape.

choices.json beside this file holds what ships; `python -m fastrank.bench.tune` writes another one
for the machine it runs on, and load_choices(path) uses that. No GPU is known by name.

    {"devices": {"sm_90": {"tiles": {"gram": {"half": {"16": [{"M": 2048, "tile": [32, 64, 4, 3]},
                                                              {"tile": [32, 128, 8, 3]}]}}},
                           "routes": {"forward": {"half": [{"R": 32, "use": "gemm"},
                                                           {"use": "vendor"}]}}}}}

- A device is the compute capability ("sm_90", "gfx942"), then the nearest lower one of its family
  that the table has, then "default". An entry need not be complete: what it lacks is default's.
- tiles: kernel -> what multiplies -> BLOCK_R -> rules; see tiles.py for the names. The smallest
  BLOCK_R that holds all ranks is taken, or the largest there is.
- routes: step -> what multiplies -> rules. "forward" and "dx" choose between the "vendor"'s product
  followed by the branch in place, and one "gemm"; "forward_any" and "dx_any" likewise for calls
  that draw dropout there, have masks on the device, or odd shapes. "dual" chooses "one_read" or
  "two_reads" of dY for dB and dS.
- Rules are tried in order. One applies where M (rows), W (columns of the matrix that is written
  or, by shrink, gram and dual, read), C (contracted columns of a gemm) and R (ranks) are at most
  what it says; and a tile, where its shared memory fits the device. Limits are powers of two, so
  that every size of a bucket finds the same rule.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrank.kernels.common.launch import INTERPRETED, Gpu
from fastrank.kernels.lowrank.choices_file import Rule, bits, family, parse, parse_entry
from fastrank.kernels.lowrank.tiles import shared_bytes

SHIPPED = Path(__file__).with_name("choices.json")


class Table:
    """The choices of one device. Lookups are cached by bucket."""

    def __init__(self, entry: dict, gpu: Gpu):
        """entry: one device's part of a table, complete, its rules parsed."""
        self._entry, self._gpu = entry, gpu
        self._tiles: dict[tuple, Any] = {}
        self._routes: dict[tuple, str] = {}

    def tile(
        self, kernel: str, operands: str, ranks: int, M: int, W: int, C: int = 1
    ) -> tuple[int, Any]:
        """(BLOCK_R, Tile or GemmTile) for these sizes."""
        key = (kernel, operands, ranks, bits(M), bits(W), bits(C))
        found = self._tiles.get(key)
        if found is None:
            found = self._tiles[key] = self._find_tile(*key)
        return found

    def route(self, step: str, operands: str, ranks: int, M: int, W: int, C: int = 1) -> str:
        """What one of USES[step] to take for these sizes."""
        key = (step, operands, ranks, bits(M), bits(W), bits(C))
        found = self._routes.get(key)
        if found is None:
            rules = self._entry["routes"][step][operands]
            found = self._routes[key] = next(_applying(rules, *key[2:]))
        return found

    def blocks(self, kernel: str, operands: str) -> list[int]:
        """Sizes of BLOCK_R that the kernel has tiles for."""
        return sorted(self._entry["tiles"][kernel][operands])

    def tiles(self) -> Iterator[tuple[str, str, int, Any]]:
        """Every (kernel, operands, BLOCK_R, tile) that a lookup on this device can give."""
        for kernel, by_operands in self._entry["tiles"].items():
            for operands, by_block in by_operands.items():
                for block_r, rules in by_block.items():
                    # two rules of a list may have the same tile
                    for tile in dict.fromkeys(rule.value for rule in rules):
                        if self._fits(kernel, operands, block_r, tile):
                            yield kernel, operands, block_r, tile

    def _find_tile(self, kernel: str, operands: str, ranks: int, *sizes: int) -> tuple[int, Any]:
        by_block = self._entry["tiles"][kernel][operands]
        block_r = min((r for r in by_block if r >= ranks), default=max(by_block))
        for tile in _applying(by_block[block_r], ranks, *sizes):
            if self._fits(kernel, operands, block_r, tile):
                return block_r, tile
        raise RuntimeError(
            f"no tile of {kernel}, {operands}, BLOCK_R {block_r} fits the {self._gpu.shared} bytes "
            "of shared memory of this device; end its rules with a smaller tile"
        )

    def _fits(self, kernel: str, operands: str, block_r: int, tile: Any) -> bool:
        needed = shared_bytes(kernel, operands, block_r, tile, self._gpu.hip)
        return needed <= self._gpu.shared


def _applying(rules: list[Rule], ranks: int, *sizes: int) -> Iterator[Any]:
    sizes = (*sizes, bits(ranks))
    for rule in rules:
        if all(size <= most for size, most in zip(sizes, rule.limits, strict=True)):
            yield rule.value


def nearest(device: str, known: Any) -> str:
    """The name in `known` whose entry serves a device."""
    mine = family(device)
    lower = []
    for name in known:
        other = family(name)
        if mine is not None and other is not None and other[0] == mine[0]:
            lower += [(other[1], name)] if other[1] <= mine[1] else []
    return max(lower)[1] if lower else "default"


def _merged(base: dict, over: dict) -> dict:
    """base, with what over says of a kernel or step and an operand in place of base's."""
    result = {}
    for part in ("tiles", "routes"):
        result[part] = {name: dict(by) for name, by in base[part].items()}
        for name, by in over[part].items():
            for operands, rules in by.items():
                result[part].setdefault(name, {})[operands] = rules
    return result


_devices: dict[str, dict] | None = None
_override: dict | None = None
_tables: dict[Gpu, Table] = {}


def table_named(name: str, gpu: Gpu) -> Table:
    """The table of one of the shipped or loaded devices, or "default", as gpu would use it."""
    global _devices
    if _devices is None:
        _devices = parse(json.loads(SHIPPED.read_text()), SHIPPED.name)
    entry = _devices["default"]
    if name != "default":
        entry = _merged(entry, _devices[name])
    if _override is not None:
        entry = _merged(entry, _override)
    return Table(entry, gpu)


def known_devices() -> list[str]:
    """Names that table_named() takes."""
    table_named("default", INTERPRETED)
    return list(_devices)


def table_for(gpu: Gpu) -> Table:
    """The choices of a device: what load_choices() read last, or what ships."""
    found = _tables.get(gpu)
    if found is None:
        name = nearest(gpu.capability, known_devices())
        found = _tables[gpu] = table_named(name, gpu)
    return found


def load_choices(path: str | Path | None) -> None:
    """Use the table in a file from now on, in this process; None for the one that ships.

        fastrank.kernels.lowrank.load_choices("tuned/choices.json")

    Devices that the file lacks keep what ships for them.

    Raises:
        ValueError: the file isn't such a table; says where.
    """
    global _devices
    found = json.loads(SHIPPED.read_text())
    if path is not None:
        try:
            mine = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(mine, dict) or not isinstance(mine.get("devices"), dict):
            raise ValueError(f'{path} has no "devices"; see the head of choices.py for the form')
        found = {"devices": found["devices"] | mine["devices"]}
    _devices = parse(found, str(path or SHIPPED.name))
    _tables.clear()


@contextmanager
def override(entry: dict) -> Iterator[None]:
    """Rules that go before every device's own in here, in the form of one device's entry.

    with override({"routes": {"forward": {"half": [{"use": "gemm"}]}}}): ...

    For tuning and tests: tiles need not end with a small one. Not for several threads at once.
    """
    global _override
    parsed = parse_entry("override", entry, last_fits=False)
    before = _override
    _override = parsed if before is None else _merged(before, parsed)
    _tables.clear()
    try:
        yield
    finally:
        _override = before
        _tables.clear()
