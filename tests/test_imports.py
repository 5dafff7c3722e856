"""The direction of imports, read from the sources: methods -> layers -> kernels, and no circles."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find_modules() -> dict[str, Path]:
    """Import name -> file, as setup.py maps them."""
    found = {}
    for top, prefix in (("fastrank", "fastrank"), ("bench", "fastrank.bench")):
        for path in (ROOT / top).rglob("*.py"):
            found[".".join([prefix, *path.relative_to(ROOT / top).with_suffix("").parts])] = path
    for path in (ROOT / "kernels").glob("*/**/*.py"):
        found[".".join(["fastrank", *path.relative_to(ROOT).with_suffix("").parts])] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_nodes(node: ast.AST, inside_functions: bool):
    """Import statements that can run; on import alone, unless `inside_functions`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif type_checking(child):
            for other in child.orelse:
                yield from import_nodes(ast.Module([other], []), inside_functions)
        elif inside_functions or not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            yield from import_nodes(child, inside_functions)


def targets(name: str, inside_functions: bool = True) -> set[str]:
    """What a module imports: our modules by their full name, others as written."""
    found = set()
    for node in import_nodes(TREES[name], inside_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif node.level:
            found.add("." * node.level + (node.module or ""))
        else:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found - {name}


IMPORTS = {name: targets(name) for name in MODULES}
ON_IMPORT = {name: targets(name, inside_functions=False) for name in MODULES}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def touched_by(name: str) -> set[str]:
    """Every module, ours or not, that importing `name` loads, parents included."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if "." in current:
            todo.append(current.rpartition(".")[0])
        todo.extend(ON_IMPORT.get(current, ()))
    return seen


def violations(allowed) -> list[str]:
    """`a imports b` for each of our imports that `allowed(a, b)` refuses."""
    return [
        f"{name} imports {target}"
        for name, found in sorted(IMPORTS.items())
        for target in sorted(found)
        if not allowed(name, target)
    ]


def test_the_sources_are_found():
    assert {"fastrank", "fastrank.kernels", "fastrank.bench", "fastrank.kernels.lowrank"} <= (
        MODULES.keys()
    )
    assert "fastrank.errors" in IMPORTS["fastrank.federated.partition"]


def test_what_counts_as_an_import():
    tree = ast.parse(
        "import a\n"
        "if TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "try:\n    import d\nexcept ImportError:\n    import e\n"
        "class K:\n    import f\n    def m(self):\n        import g\n"
    )

    def names(inside_functions):
        return "".join(node.names[0].name for node in import_nodes(tree, inside_functions))

    assert names(inside_functions=False) == "acdef"
    assert names(inside_functions=True) == "acdefg"


def test_every_import_of_ours_exists():
    assert violations(lambda n, t: not within(t, "fastrank") or t in MODULES) == []
    assert violations(lambda n, t: not t.startswith(".")) == []
    # `kernels.<op>` would load a second copy of the op
    assert violations(lambda n, t: not within(t, "kernels", "bench", "tests")) == []


def test_no_circles():
    ours = {name: found & MODULES.keys() for name, found in IMPORTS.items()}
    try:
        TopologicalSorter(ours).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]))


# each may import itself, what lies below it, and nothing else of ours
LAYERS = [
    # modules, what of ours they may import
    (["fastrank.kernels.common"], ["fastrank.kernels.common"]),
    (["fastrank.kernels"], ["fastrank.kernels"]),
    (["fastrank.errors", "fastrank._version", "fastrank._lazy"], []),
    (["fastrank"], ["fastrank._version", "fastrank._lazy"]),
    (
        ["fastrank.layers", "fastrank.patching", "fastrank.merging", "fastrank.sparsifying"],
        [
            "fastrank.kernels",
            "fastrank.errors",
            "fastrank._lazy",
            "fastrank.layers",
            "fastrank.patching",
            "fastrank.merging",
            "fastrank.sparsifying",
        ],
    ),
    (
        ["fastrank.data"],
        ["fastrank.data", "fastrank.errors", "fastrank._version", "fastrank._lazy"],
    ),
    (
        ["fastrank.federated"],
        [
            "fastrank.federated",
            "fastrank.data",
            "fastrank.layers",
            "fastrank.patching",
            "fastrank.sparsifying",
            "fastrank.kernels",
            "fastrank.errors",
            "fastrank.checkout",
            "fastrank._version",
            "fastrank._lazy",
        ],
    ),
]


@pytest.mark.parametrize(("modules", "below"), LAYERS, ids=lambda names: names and names[0])
def test_imports_point_downward(modules, below):
    def covered(name):
        # the package fastrank itself is its __init__ alone
        return name == "fastrank" if modules == ["fastrank"] else within(name, *modules)

    assert any(covered(name) for name in MODULES)
    assert (
        violations(
            lambda name, target: (
                not covered(name) or not within(target, "fastrank") or within(target, *below)
            )
        )
        == []
    )


def test_layers_do_not_know_patching():
    assert (
        violations(lambda n, t: not (within(n, "fastrank.layers") and t == "fastrank.patching"))
        == []
    )


def test_methods_and_executors_do_not_know_each_other():
    methods, executors = "fastrank.federated.methods", "fastrank.federated.executors"
    forbidden = (executors, "fastrank.federated.simulation", "fastrank.federated.ledger")
    assert violations(lambda n, t: not (within(n, methods) and within(t, *forbidden))) == []
    # an executor may know what a method is, never one by name
    names = [m for m in MODULES if within(m, methods) and m not in (methods, f"{methods}.base")]
    assert names
    assert violations(lambda n, t: not (within(n, executors) and within(t, *names))) == []
    assert violations(lambda n, t: not (within(n, executors) and t == methods)) == []


def test_nothing_imports_the_command_line():
    allowed = ("fastrank.__main__", "fastrank.cli")
    assert violations(lambda n, t: t != "fastrank.cli" or within(n, *allowed)) == []


@pytest.mark.parametrize("name", sorted(m for m in MODULES if within(m, "fastrank.kernels")))
def test_kernels_load_no_model_library(name):
    heavy = {"transformers", "peft", "accelerate", "datasets", "rich", "tqdm", "matplotlib"}
    assert {target.split(".")[0] for target in touched_by(name)} & heavy == set()


def test_the_package_itself_loads_nothing():
    assert {m.split(".")[0] for m in touched_by("fastrank")} <= {"fastrank", "importlib", "typing"}
    for name in ("fastrank.federated.partition", "fastrank.errors"):
        assert "torch" not in {m.split(".")[0] for m in touched_by(name)}


def test_only_the_flower_adapter_and_its_benchmark_import_flwr():
    flower = [f"fastrank.federated.flower.{part}" for part in ("client", "records", "strategy")]
    flower.append("fastrank.bench.simulate_flower")
    assert violations(lambda n, t: not within(t, "flwr") or n in flower) == []


def test_environment_variables_are_read_in_one_place():
    found = [
        f"{name}: {node.value}"
        for name, tree in TREES.items()
        if not within(name, "fastrank.kernels.common")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"FASTRANK_\w*", node.value)
    ]
    assert found == []


def project_files() -> list[Path]:
    """Text of the project: sources, tests, documents and build files."""
    folders = ("fastrank", "kernels", "bench", "tests", "examples", ".ci")
    suffixes = {"", ".py", ".md", ".toml", ".txt", ".in", ".yaml", ".yml", ".sh"}
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [p for p in files if p.suffix in suffixes and "__pycache__" not in p.parts]


def test_no_path_of_a_machine_and_no_banned_call():
    homes = "|".join(["home", "root", "Users", "mnt", "work"])
    patterns = {
        # an absolute path in quotes, an assignment or an argument
        "a path of a machine": re.compile(rf"""["'`\s(=]/(?:{homes})/\w"""),
        # removed upstream
        "make_block_" + "ptr": re.compile("make_block_" + "ptr"),
    }
    files = project_files()
    assert len(files) > 30
    found = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in files
        for what, pattern in patterns.items()
        if pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []
