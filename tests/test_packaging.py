"""What is built and installed: one top-level name, every file, nothing of the checkout needed.

The traps are those of a top-level `kernels/` folder: Hugging Face's `kernels` library has that
import name, and transformers imports whatever answers to it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("fastrank", "kernels", "bench", "tests", "docs", "examples", ".ci")
TOP_FILES = (
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
)


def run(*command, cwd, **env):
    """Output of a command that finds neither the checkout nor a GPU by accident."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The sources alone: no build leftovers, whose stale file lists setuptools would trust."""
    copy = tmp_path_factory.mktemp("tree")
    leftovers = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*_cache")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=leftovers)
    for name in TOP_FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def dists(tree, tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist, as an index would serve them."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(dists, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel; its dependencies are lent by this one.

    A .pth line puts the lending folder on sys.path without running the .pth files in it, so an
    editable fastrank there can't be found.
    """
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-deps", "--no-index", dists[1], cwd=venv)
    (site,) = venv.glob("lib/python*/site-packages")
    lent = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in lent))
    return python


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_has_one_top_level_name_and_every_file(tree, dists):
    with zipfile.ZipFile(dists[1]) as wheel:
        names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"fastrank", info}

    expected = {name for name in files_under(tree) if name.startswith("fastrank/")}
    for name in files_under(tree):
        if name.startswith(("kernels/", "bench/")) and name != "kernels/README.md":
            expected.add(f"fastrank/{name}")
    expected = {
        name
        for name in expected
        if name.endswith((".py", "/lowrank/choices.json"))
        or "/data/encoder/" in name
        or "/bench/methods/" in name  # but not bench/results/: the sdist alone has the records
    }
    assert {name for name in names if not name.startswith(info)} == expected


def test_wheel_ships_the_encoder(dists):
    with zipfile.ZipFile(dists[1]) as wheel:
        sizes = [i.file_size for i in wheel.infolist() if "/data/encoder/" in i.filename]
    assert sizes
    assert sum(sizes) <= 15e6


def test_sdist_holds_the_whole_project(tree, dists):
    with tarfile.open(dists[0]) as sdist:
        names = {m.name.split("/", 1)[1] for m in sdist.getmembers() if m.isfile()}
    made = {name for name in names if name.startswith("fastrank.egg-info/")}
    made |= {"PKG-INFO", "setup.cfg"}
    before_the_build = {n for n in files_under(tree) if not n.startswith("fastrank.egg-info/")}
    assert names - made == before_the_build


def test_installed_wheel_works_away_from_the_checkout(installed, tmp_path):
    script = """
import fastrank, sys
import fastrank.bench
import torch
from fastrank.kernels.lowrank import lowrank_add, lowrank_linear
x, w, a, b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(2, 7), torch.randn(3, 2)
y = lowrank_linear(x, w, None, a, b, scale=0.5)
torch.testing.assert_close(y, x @ w.T + 0.5 * (x @ a.T) @ b.T)
torch.testing.assert_close(lowrank_add(x @ w.T, x, a, b, scale=0.5), y)
assert not {"transformers", "peft", "rich"} & set(sys.modules)  # kernels stand alone
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "fastrank" or "editable" in name:
        print(module.__file__)
"""
    files = run(installed, "-c", script, cwd=tmp_path).stdout.split()
    assert len(files) > 5
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in files), files


def test_installed_command_works(installed, tmp_path):
    command = installed.with_name("fastrank")
    usage = run(command, "--help", cwd=tmp_path).stdout
    assert "simulate" in usage
    assert "resume" in usage
    info = run(command, "info", cwd=tmp_path).stdout
    assert "torch" in info
    assert list(tmp_path.iterdir()) == []  # neither writes where it is run


def test_transformers_and_fastrank_from_the_checkout():
    # `python -c` puts the checkout first on sys.path, where kernels/ lies
    script = "import transformers.modeling_utils, fastrank; print(fastrank.__version__)"
    done = run(sys.executable, "-c", script, cwd=ROOT)
    assert done.stdout.strip()
    assert "rror" not in done.stderr


def test_import_is_silent_light_and_fast(tmp_path):
    script = """
import sys, time
start = time.perf_counter()
import fastrank
seconds = time.perf_counter() - start
heavy = {"torch", "triton", "transformers", "peft", "numpy", "rich"} & set(sys.modules)
sys.stderr.write(f"{seconds} {sorted(heavy)}")
"""
    runs = [run(sys.executable, "-c", script, cwd=tmp_path) for _ in range(3)]
    assert all(done.stdout == "" for done in runs)
    assert all(done.stderr.endswith(" []") for done in runs), runs[0].stderr
    # not even torch is loaded, so this bounds what importing fastrank adds to it
    assert median(float(done.stderr.split()[0]) for done in runs) < 1.0


@pytest.mark.slow
def test_installed_command_runs_a_simulation(installed, tmp_path):
    # the encoder comes out of the wheel, the text out of the lent dependencies
    options = "--num-rounds 2 --num-clients 4 --clients-per-round 2 --local-steps 2"
    command = (installed.with_name("fastrank"), "simulate", *options.split())
    done = run(*command, "--max-examples", "400", "--output-dir", "out", cwd=tmp_path)
    assert "accuracy" in done.stdout
    rows = (tmp_path / "out" / "rounds.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["round", "1", "2"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
