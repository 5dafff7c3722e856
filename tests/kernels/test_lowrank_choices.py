"""Tables of choices: what ships, lookups by bucket and device, checks of what a user brings."""

import copy
import json
import timeit

import pytest
import torch

from fastrank.kernels.common.launch import INTERPRETED, Gpu, gpu_of, pretend
from fastrank.kernels.lowrank import load_choices
from fastrank.kernels.lowrank.choices import (
    SHIPPED,
    Table,
    nearest,
    override,
    table_for,
    table_named,
)
from fastrank.kernels.lowrank.choices_file import SMALL_SHARED, dumps, parse
from fastrank.kernels.lowrank.tiles import OPERANDS, GemmTile, Tile, shared_bytes

H200 = Gpu("sm_90", 132, 227 << 10)
SMALL = Gpu("sm_75", 40, 64 << 10)
MI300 = Gpu("gfx942", 304, 64 << 10)
SHAPES = [(1, 64, 64), (512, 4096, 4096), (8192, 4096, 14336), (70_000, 11008, 4096)]


@pytest.fixture
def shipped() -> dict:
    return json.loads(SHIPPED.read_text())


@pytest.fixture
def restored():
    yield
    load_choices(None)


@pytest.mark.parametrize(
    ("device", "served_by"),
    [
        ("sm_90", "sm_90"),
        ("sm_89", "sm_80"),
        ("sm_120", "sm_90"),
        ("sm_75", "default"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx90a", "default"),
        ("gfx1100", "default"),
        ("none", "default"),
    ],
)
def test_the_nearest_lower_capability_serves(device, served_by, shipped):
    assert nearest(device, shipped["devices"]) == served_by


@pytest.mark.parametrize("gpu", [H200, SMALL, MI300, INTERPRETED], ids=lambda g: g.capability)
@pytest.mark.parametrize("ranks", [1, 16, 24, 64, 300])
def test_every_lookup_has_a_tile_that_fits(gpu, ranks):
    table = table_for(gpu)
    for kernel, several in OPERANDS.items():
        for operands, shape in ((o, s) for o in several for s in SHAPES):
            block_r, tile = table.tile(kernel, operands, ranks, *shape)
            assert shared_bytes(kernel, operands, block_r, tile, gpu.hip) <= gpu.shared
            assert isinstance(tile, GemmTile if kernel.startswith("gemm") else Tile)
            blocks = table.blocks(kernel, operands)
            assert block_r == min((b for b in blocks if b >= ranks), default=blocks[-1])


def test_less_shared_memory_takes_a_smaller_tile():
    large = table_for(H200).tile("gemm", "half", 16, 8192, 4096, 4096)[1]
    small = table_for(H200._replace(shared=SMALL_SHARED)).tile("gemm", "half", 16, 8192, 4096, 4096)
    assert shared_bytes("gemm", "half", 16, large) > SMALL_SHARED
    assert shared_bytes("gemm", "half", *small) <= SMALL_SHARED


def test_rules_apply_up_to_their_limits(shipped):
    shipped["devices"]["sm_90"]["tiles"]["gram"] = {
        "half": {
            "16": [
                {"M": 2048, "W": 4096, "tile": [16, 16, 1, 1]},
                {"R": 8, "tile": [16, 32, 1, 1]},
                {"tile": [16, 64, 1, 1]},
            ]
        }
    }
    table = Table(parse(shipped)["sm_90"], H200)
    found = {
        sizes: table.tile("gram", "half", *sizes)[1].block_w
        for sizes in [(16, 2048, 4096), (16, 2049, 4096), (16, 2048, 4097), (8, 4096, 64)]
    }
    assert list(found.values()) == [16, 64, 64, 32]


def test_routes_follow_the_table():
    assert table_for(H200).route("forward", "half", 16, 8192, 4096, 4096) == "vendor"
    rules = [{"M": 1024, "use": "vendor"}, {"use": "gemm"}]
    with override({"routes": {"forward": {"half": rules}}}):
        table = table_for(H200)
        assert table.route("forward", "half", 16, 1024, 4096, 4096) == "vendor"
        assert table.route("forward", "half", 16, 1025, 4096, 4096) == "gemm"
        assert table.route("dx", "half", 16, 8192, 4096, 4096) == "vendor"
    assert table_for(H200).route("forward", "half", 16, 8192, 4096, 4096) == "vendor"


def test_overrides_nest_and_end():
    tile = {"tiles": {"expand": {"half": {"16": [{"tile": [16, 16, 1, 1]}]}}}}
    route = {"routes": {"dual": {"half": [{"use": "two_reads"}]}}}
    before = table_for(H200).tile("expand", "half", 16, 64, 64)
    with override(tile), override(route):
        assert table_for(H200).tile("expand", "half", 40, 64, 64) == (16, Tile(16, 16, 1, 1))
        assert table_for(H200).route("dual", "half", 16, 64, 64) == "two_reads"
    assert table_for(H200).tile("expand", "half", 16, 64, 64) == before


def test_a_users_table_replaces_its_devices_only(tmp_path, restored):
    mine = {"devices": {"sm_90": {"routes": {"dx": {"half": [{"use": "gemm"}]}}}}}
    (tmp_path / "mine.json").write_text(dumps(mine))
    ampere = table_for(Gpu("sm_80", 108, 163 << 10)).tile("gemm", "half", 16, 64, 64, 64)
    load_choices(tmp_path / "mine.json")
    assert table_for(H200).route("dx", "half", 16, 8192, 4096, 4096) == "gemm"
    assert table_for(Gpu("sm_80", 108, 163 << 10)).tile("gemm", "half", 16, 64, 64, 64) == ampere
    load_choices(None)
    assert table_for(H200).route("dx", "half", 16, 8192, 4096, 4096) == "vendor"


def change(table: dict, path: str, value) -> None:
    *parents, last = path.split("/")
    for name in parents:
        table = table[name]
    if value is None:
        del table[last]
    else:
        table[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("devices/default", None, 'no "default" device'),
        ("devices/H200", {}, "unknown device 'H200'; name it sm_NN or gfxNNN"),
        ("devices/default/tiles/shrink", None, "default has no tiles.shrink.half"),
        ("devices/default/routes/dx/mixed", None, "default has no routes.dx.mixed"),
        ("devices/default/tiles/matmul", {}, r"unknown \['matmul'\]; choose from shrink"),
        ("devices/sm_90/tiles/gemm/tf32", {}, r"unknown \['tf32'\]; choose from half, mixed"),
        ("devices/default/tiles/gram/half/24", [], "BLOCK_R is '24'; choose from 16"),
        ("devices/default/tiles/gram/half/16", [], r"gram.half.16 is \[\]; give a list of rules"),
        ("devices/default/tiles/gram/half/16", [{"tile": [16, 16, 4]}], "give .block_m, block_w"),
        ("devices/default/tiles/gram/half/16", [{"tile": [16, 48, 4, 1]}], "block_w is 48"),
        ("devices/default/tiles/gram/half/16", [{"tile": [16, 16, True, 1]}], "num_warps is True"),
        ("devices/default/tiles/gram/half/16", [{"M": 3, "tile": [16, 16, 4, 1]}], "powers of two"),
        ("devices/default/tiles/gram/half/16", [{"M": 4, "tile": [16, 16, 4, 1]}], "last rule has"),
        ("devices/default/tiles/gram/half/16", [{"m": 4, "tile": [16, 16, 4, 1]}], "limits"),
        ("devices/default/tiles/gram/half/16", [{"tile": [256, 256, 8, 4]}], "end with one of at"),
        ("devices/default/tiles/gemm/half/16", [{"tile": [16, 16, 128, 1, 4, 1]}], "at most 64"),
        ("devices/default/routes/dx/half", [{"use": "cublas"}], "choose one of vendor, gemm"),
    ],
)
def test_what_is_wrong_is_named(path, value, message, shipped, tmp_path):
    wrong = copy.deepcopy(shipped)
    change(wrong, path, value)
    with pytest.raises(ValueError, match=message):
        parse(wrong)


def test_unreadable_files_are_refused(tmp_path, restored):
    for text, message in (("{", "is not JSON"), ("[]", 'no "devices"')):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_choices(tmp_path / "wrong.json")
    assert table_for(H200).route("dx", "half", 16, 8192, 4096, 4096) == "vendor"


def test_written_tables_read_back(shipped):
    assert json.loads(dumps(shipped)) == shipped
    assert SHIPPED.read_text() == dumps(shipped) + "\n"


def test_a_lookup_is_cheap():
    table = table_for(H200)
    seconds = min(
        timeit.repeat(lambda: table.tile("shrink", "half", 16, 8192, 4096), number=2000, repeat=5)
    )
    assert seconds / 2000 < 4e-6  # 0.2 µs where nothing else ran


def test_a_pretended_device_is_used():
    assert gpu_of(torch.device("cpu")) == INTERPRETED
    with pretend(H200):
        assert gpu_of(torch.device("cpu")) == H200
    assert gpu_of(torch.device("cpu")) == INTERPRETED
    assert table_named("sm_90", H200).tile("gemm", "half", 16, 8192, 4096, 4096) == table_for(
        H200
    ).tile("gemm", "half", 16, 8192, 4096, 4096)
