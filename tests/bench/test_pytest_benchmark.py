"""`pytest bench/ --benchmark-only`: what it collects, that it measures, that it judges first."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrank.bench import BENCHES, conftest, grouped_cases

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("pytest_benchmark")
speed = pytest.importorskip("fastrank.bench.test_speed")


def run(*words):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


def test_one_op_is_measured_and_says_how_right_it_was(tmp_path):
    file = tmp_path / "speed.json"
    done = run("--benchmark-only", "--bench-device", "cpu", "-k", "grouped", "--benchmark-max-time",
               "0.01", "--benchmark-min-rounds", "2", "--benchmark-json", str(file))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    others = len(speed.PARAMETERS) - 3
    assert re.search(rf"3 passed, {others} deselected", done.stdout)
    found = json.loads(file.read_bytes())["benchmarks"]
    assert {one["params"]["variant"] for one in found} == set(speed.VARIANTS["grouped"])
    (group,) = {one["group"] for one in found}
    assert group == "grouped M64-d96-G4-R4"
    for one in found:
        assert one["stats"]["median"] > 0
        assert 0 < one["extra_info"]["error"] < 1e-5
        assert one["extra_info"]["peak_bytes"] > 0
        assert one["extra_info"]["torch"] == torch.__version__


@pytest.mark.parametrize("given", [True, False])
def test_without_the_flag_everything_is_skipped(given):
    marks = []
    item = SimpleNamespace(add_marker=marks.append)
    config = SimpleNamespace(getoption=lambda name, default: {"--benchmark-only": given}[name])
    conftest.pytest_collection_modifyitems(config, [item, item])
    assert [mark.name for mark in marks] == ([] if given else ["skip", "skip"])
    assert all("--benchmark-only" in mark.kwargs["reason"] for mark in marks)


def test_a_plain_run_of_the_tests_does_not_look_here(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_every_op_is_there():
    assert speed.VARIANTS.keys() == BENCHES.keys() - {"all"}
    for op, variants in speed.VARIANTS.items():
        assert {"fastrank", "grouped"} & set(variants), op


def test_a_wrong_variant_fails_before_it_is_timed(monkeypatch, capsys):
    loop = grouped_cases.BUILDERS["loop"]

    def louder(case, operands):
        step = loop(case, operands)
        layer = step.layer
        step.layer = lambda x: 1.1 * layer(x)
        return step

    def timed(step):
        raise AssertionError("it was timed")

    builders = {**grouped_cases.BUILDERS, "grouped": louder}
    monkeypatch.setattr(grouped_cases, "BUILDERS", builders)
    speed._prepared.cache_clear()
    try:
        with pytest.raises(pytest.fail.Exception, match="WrongResult"):
            speed.test_speed(timed, torch.device("cpu"), "grouped", "grouped")
    finally:
        speed._prepared.cache_clear()


@pytest.mark.parametrize(
    ("op", "variant", "outcome", "words"),
    [
        ("lowrank", "peft-compiled", pytest.skip.Exception, "runs on cuda alone; this is cpu"),
        ("svd", "sklearn", pytest.fail.Exception, "compared on cpu, and svd left it out"),
        ("grouped", "loop", pytest.fail.Exception, "compared on cpu, and grouped left it out"),
    ],
)
def test_only_what_another_device_has_may_be_missing(monkeypatch, op, variant, outcome, words):
    monkeypatch.setattr(speed, "_prepared", lambda op, device: ("case", {}, {}))
    with pytest.raises(outcome, match=words):
        speed.test_speed(None, torch.device("cpu"), op, variant)
