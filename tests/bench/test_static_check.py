"""The committed static report says what the launchers choose and what the compilers make of it.

What is planned is compared whole. What is compiled is compared for a sample of one variant of each
kernel, drawn from the commit, and in the slow run for everything. The comparisons find what is
wrong with doctored reports.
"""

import copy
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest

from fastrank.bench.static import compiled_row
from fastrank.bench.static_check import (
    COMMITTED,
    compiled_differences,
    draw_of,
    key_of,
    load,
    planning_differences,
    sample,
)
from fastrank.bench.static_kernels import every_variant
from fastrank.bench.static_machine import occupancy

HOW = "python -m fastrank.bench.static --out bench/results/static"


@cache
def variants():
    return list(every_variant())


@cache
def report():
    return load()


def doctored(tmp_path, key, **changes):
    """The committed report with one row changed, or without it."""
    found = json.loads(COMMITTED.read_text())
    rows = found["kernels"]
    place = next(i for i, r in enumerate(rows) if (r["op"], r["target"], r["kernel"]) == key)
    if changes:
        rows[place] |= changes
    else:
        del rows[place]
    path = tmp_path / "static.json"
    path.write_text(json.dumps(found))
    return load(path)


@pytest.mark.aot
def test_the_report_has_what_is_launched_with_its_work():
    assert len(variants()) > 400
    assert planning_differences(report(), variants()) == []


@pytest.mark.aot
def test_the_report_has_every_plan_of_a_layer():
    from fastrank.bench.static import shape_rows

    assert json.loads(json.dumps(list(shape_rows()))) == report().shapes


@pytest.mark.aot
def test_a_sample_compiles_as_the_report_says():
    import triton

    from fastrank.checkout import commit

    several = sample(variants(), draw_of(commit()[0]))
    assert {v.target for v in several} == {"sm_80", "sm_90", "gfx942"}
    found = [compiled_differences(report(), v, triton.__version__) for v in several]
    assert [c for each in found for c in each] == []


def differences(index):
    import triton

    return compiled_differences(report(), variants()[index], triton.__version__)


@pytest.mark.aot
@pytest.mark.slow
def test_everything_compiles_as_the_report_says():
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(differences, range(len(variants())), chunksize=8)
        assert [c for each in found for c in each] == []


def test_a_sample_has_every_kernel_and_samples_go_through_all_variants():
    every = variants()
    kernels = {v.function for v in every}
    for target in ("sm_80", "sm_90", "gfx942"):
        assert {v.function for v in every if v.target == target} == kernels
    seen = set()
    for draw in range(200, 200 + max(sum(v.function == k for v in every) for k in kernels)):
        several = sample(every, draw)
        assert len(several) == len(kernels) == len({v.function for v in several})
        assert len({v.target for v in several}) == 3
        seen |= {key_of(v) for v in several}
    assert seen == {key_of(v) for v in every}
    assert draw_of("ff" * 20) == 0xFFFFFFFF
    assert draw_of(None) == 0


@cache
def a_gram():
    """One that compiles quickly and multiplies."""
    return next(v for v in variants() if (v.function, v.target) == ("lowrank_gram", "gfx942"))


def test_a_doctored_plan_is_found(tmp_path):
    key = key_of(a_gram())
    [said] = planning_differences(doctored(tmp_path, key, read=1), variants())
    assert said.startswith(f"{' '.join(key)} has read {a_gram().work.read}, and 1 in the report")
    assert HOW in said
    [said] = planning_differences(doctored(tmp_path, key), variants())
    assert "is launched and not in the report" in said
    assert HOW in said
    fewer = [v for v in variants() if key_of(v) != key]
    [said] = planning_differences(report(), fewer)
    assert "no longer launched" in said


@pytest.mark.aot
@pytest.mark.parametrize("function", ["lowrank_gram", "lowrank_dual"])
def test_occupancy_by_registers_is_the_compilers(monkeypatch, function):
    """The assembler says how many waves a SIMD's registers allow, of programs without LDS."""
    import triton

    variant = next(v for v in variants() if (v.function, v.target) == (function, "gfx942"))
    found, compile = [], triton.compile

    def kept(*arguments, **options):
        found.append(compile(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(triton, "compile", kept)
    row = compiled_row(variant)
    said = re.search(r"; Occupancy: (\d+)", found[0].asm["amdgcn"])
    assert occupancy("gfx942", row["registers"], 0, 1) == int(said.group(1))


@pytest.mark.aot
@pytest.mark.parametrize("name", ["registers", "spills", "shared", "occupancy", "instructions"])
def test_a_doctored_result_is_found(tmp_path, name):
    """At the recorded version every number counts."""
    key = key_of(a_gram())
    true = report().rows[key][name]
    changed = copy.deepcopy(true)
    if isinstance(changed, dict):
        changed["v_mfma"] += 1
    else:
        changed += 1
    wrong = doctored(tmp_path, key, **{name: changed})
    [said] = compiled_differences(wrong, a_gram(), wrong.triton)
    assert said.startswith(f"{' '.join(key)} has {name} {true}, and {changed} in the report")
    assert HOW in said


@pytest.mark.aot
def test_at_another_version_numbers_are_bounds(tmp_path):
    key = key_of(a_gram())
    row = report().rows[key]

    def said(**changes):
        return compiled_differences(doctored(tmp_path, key, **changes), a_gram(), "another")

    # fewer than recorded is fine, and so is a little more
    assert said(registers=row["registers"] + 9, shared=row["shared"] + 9) == []
    assert said(registers=row["registers"] - 16, shared=row["shared"] - 4096) == []
    [one] = said(registers=(row["registers"] - 20) * 4 // 5)
    assert "registers with Triton another" in one
    assert HOW in one
    [one] = said(shared=row["shared"] * 2 // 3 - 4096)
    assert f"takes {row['shared']} shared" in one
