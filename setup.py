"""The package map; all metadata is in pyproject.toml.

Every folder under kernels/ with an __init__.py becomes fastrank.kernels.<op>, and bench/ becomes
fastrank.bench, so the wheel ships one top-level name. kernels/ itself must stay without an
__init__.py: Hugging Face's `kernels` library has that import name.
"""

from pathlib import Path

from setuptools import find_packages, setup

mapped = {
    f"fastrank.kernels.{init.parent.name}": f"kernels/{init.parent.name}"
    for init in sorted(Path("kernels").glob("*/__init__.py"))
}
mapped["fastrank.bench"] = "bench"

setup(
    packages=[*find_packages(include=["fastrank", "fastrank.*"]), *mapped],
    package_dir=mapped,
)
