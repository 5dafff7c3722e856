"""Every `>>>` example in a docstring of fastrank and its kernels runs and prints what it says."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import fastrank

ROOT = Path(__file__).parents[1]
# what a reader looks for first: these have an example each
SHOWN = {
    "fastrank": ["LowRankLinear", "Simulation", "merge_adapters", "patch", "sparsify", "unpatch"],
    "fastrank.kernels.lowrank": ["grouped_lowrank_linear", "lowrank_add", "lowrank_linear"],
    "fastrank.kernels.packing": [
        "SparseMask", "aggregate", "masked_weight_grad", "pack", "sparse_linear", "topk_pack",
        "unpack", "unpack_add_",
    ],
    "fastrank.kernels.svd": ["truncated_svd", "truncated_svd_many"],
}  # fmt: skip


def with_examples() -> list[str]:
    """Modules that have an example in a docstring, found without importing any."""
    found = []
    for top, prefix in (("fastrank", "fastrank"), ("kernels", "fastrank.kernels")):
        for path in sorted((ROOT / top).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
            if any(doctest.DocTestParser().get_examples(text) for text in texts):
                parts = path.relative_to(ROOT / top).with_suffix("").parts
                found.append(".".join([prefix, *parts]).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    # nothing of the module's own names: what else an example needs, its reader has to import
    known = {"torch": torch, "fastrank": fastrank}
    tests = doctest.DocTestFinder().find(module, globs=known)
    tests = [test for test in tests if test.examples]
    assert tests
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        torch.manual_seed(0)
        said = []
        runner.run(test, out=said.append)
        assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("package", SHOWN)
def test_main_functions_have_an_example(package):
    module = importlib.import_module(package)
    parse = doctest.DocTestParser().get_examples
    without = [name for name in SHOWN[package] if not parse(getattr(module, name).__doc__)]
    assert without == []


def test_an_example_that_is_wrong_is_found():
    parsed = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(parsed, out=[].append).failed == 1
