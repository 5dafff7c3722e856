"""English text out of Python source: docstrings through `ast`, cleaned, split, masked.

Nothing here imports the package it reads, and every function is a pure function of its input.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_WORDS = 8
MASK = "pkg"

SKIPPED_FOLDERS = frozenset(
    {
        *("test", "tests", "testing", "_testing"),
        *("vendor", "_vendor", "vendored", "_vendored", "extern", "third_party"),
        *("__pycache__", "node_modules", "site-packages"),
    }
)

# names distinctive enough that any word containing one gives the package away (pytorch, numpydoc)
ROOTS = (
    *("sympy", "networkx", "numpy", "mpmath", "torch", "huggingface"),
    *("peft", "setuptools", "fsspec", "jinja"),
)
# names that are English words or too short to look for inside other words
WHOLE_WORDS = (
    *("transformers", "accelerate", "polys", "physics", "combinatorics", "matrices", "geometry"),
    *("inductor", "distributed", "nn", "ao", "fx", "generation", "stats", "core", "solvers"),
    *("utils", "onnx", "dynamo", "np", "nx", "hf"),
)
# CamelCase spellings that fall apart when identifiers are split
_SPELLINGS = (
    "sym py|network x|num py|mp math|py torch|hugging face(?: hub)?|setup tools|fs spec|"
    "hugging face"
)

_IDENTIFIER_ROOTS = "|".join([*ROOTS, "huggingface_hub", "transformers", "accelerate"])
_DOTTED = re.compile(rf"(?<![\w.])(?:{_IDENTIFIER_ROOTS})2?(?:\.\w+)+", re.IGNORECASE)
_SNAKE = re.compile(r"(?<=\w)_+|_+(?=\w)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NAMES = re.compile(
    rf"(?<![A-Za-z])(?:{_SPELLINGS}|{'|'.join(WHOLE_WORDS)})(?![A-Za-z])"
    rf"|(?<![A-Za-z])[A-Za-z]*(?:{'|'.join(ROOTS)})[A-Za-z]*\d*",
    re.IGNORECASE,
)
_REPEATED = re.compile(rf"\b{MASK}(?:[\s.]+{MASK})+\b")

_TEST_FILE = re.compile(r"test_|conftest|.*_test\.py$")
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_URL = re.compile(r"(?:https?|ftp)://\S+|www\.\S+")
_RULER = re.compile(r"\s*[-=~^*_#+.`'\"]{3,}\s*$")
_IMPORT = re.compile(r"\s*(?:from\s+[\w.]+\s+import\b|import\s+[\w.]+(?:\s+as\s+\w+)?\s*$)")
_DIRECTIVE = re.compile(r"(\s*)\.\.\s+(?:code-block|code|plot|testcode|math)::")
_MARKUP = re.compile(r"`+|\*\*|:(?:class|func|meth|attr|mod|ref|obj|term|data|py:\w+):")


def python_files(folder: Path) -> Iterator[Path]:
    """Yield the .py files under `folder` (or the file itself), sorted, without tests."""
    if folder.is_file():
        yield folder
        return
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.is_dir():
            if path.name not in SKIPPED_FOLDERS and not path.name.startswith("."):
                yield from python_files(path)
        elif path.suffix == ".py" and not _TEST_FILE.match(path.name):
            yield path


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings of a module, its classes and its functions, in source order.

    Source that does not parse gives an empty list: packages ship templates and files for other
    Python versions under .py names.
    """
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found.append(inspect.cleandoc(first.value.value))
        # definitions sit in statement lists only: no need to walk expressions
        for field in ("orelse", "handlers", "finalbody", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                stack.extend(reversed(children))
    return found


def clean(docstring: str) -> str:
    """Drop what is not prose: doctests and their output, code, imports, rulers, URLs, markup."""
    kept: list[str] = []
    in_doctest = False
    block_indent: int | None = None
    for line in _FENCE.sub("\n", docstring).splitlines():
        stripped = line.strip()
        if not stripped:
            in_doctest = False
            continue
        indent = len(line) - len(line.lstrip())
        if block_indent is not None:
            if indent > block_indent:
                continue
            block_indent = None
        directive = _DIRECTIVE.match(line)
        if directive:
            block_indent = len(directive.group(1))
            continue
        if stripped.startswith(">>>"):
            in_doctest = True
        if in_doctest or stripped.startswith("..."):
            continue
        if _RULER.match(line) or _IMPORT.match(line):
            continue
        kept.append(_URL.sub(" ", stripped))
    return " ".join(_MARKUP.sub(" ", " ".join(kept)).split())


def mask(text: str) -> str:
    """Replace every listed package name, and dotted paths rooted in one, by "pkg".

    Identifiers are split at underscores and case changes first, so that `PeftModel` and
    `get_peft_model` do not carry the name through.
    """
    text = _DOTTED.sub(MASK, text)
    text = _CAMEL.sub(" ", _SNAKE.sub(" ", text))
    text = _NAMES.sub(MASK, text)
    return _REPEATED.sub(MASK, " ".join(text.split()))


def words_of(docstring: str, limit: int | None = None) -> list[str]:
    """Return the words of the cleaned and masked docstring, the first `limit` if given."""
    words = clean(docstring).split()
    if limit is not None:
        # masking can merge words as well as split them: leave it room
        words = words[: 3 * limit]
    return mask(" ".join(words)).split()[:limit]
