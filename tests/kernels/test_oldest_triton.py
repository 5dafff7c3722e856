"""The kernels on the oldest supported Triton, in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"


@pytest.fixture(scope="module")
def oldest(tmp_path_factory) -> Path:
    """A Python with the oldest Triton in front of the packages of this one."""
    folder = tmp_path_factory.mktemp("oldest-triton")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # its interpreter turns one-element arrays into numbers, which newer NumPy refuses
    wanted = [f"triton=={OLDEST}", "numpy>=2.0,<2.4"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *wanted], check=True)
    get_path = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", get_path], capture_output=True, text=True, check=True)
    behind = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(site.stdout.strip()) / "zz_behind.pth").write_text(behind)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["interpret", "aot"])
def test_kernels_on_the_oldest_triton(oldest, mark, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_INTERPRET"] = "1" if mark == "interpret" else "0"
    version = [oldest, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == OLDEST
    command = [oldest, "-m", "pytest", "-q", "-m", f"{mark} and not slow", "tests/kernels"]
    done = subprocess.run(
        [*command, "-o", f"cache_dir={tmp_path}/pytest"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout[-4000:], sys.version)
    assert done.returncode == 0
