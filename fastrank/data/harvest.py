"""The embedded task, "20 packages": which installed package does a docstring come from?

The text is harvested from the packages that fastrank's own dependencies install, without importing
them, and is a pure function of their source: files sorted, duplicates dropped, the lowest SHA-256
digests kept, the split decided by a second digest. What comes out depends on the installed
versions; the fingerprint says which text it was.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastrank.data import docstrings as ds
from fastrank.errors import UsageError

logger = logging.getLogger("fastrank")

CLASSES = (
    "sympy.polys",
    "sympy.physics",
    "sympy.combinatorics",
    "sympy.matrices",
    "sympy.geometry",
    "networkx",
    "numpy",
    "mpmath",
    "torch._inductor",
    "torch.distributed",
    "torch.nn",
    "torch.ao",
    "torch.fx",
    "transformers.generation",
    "huggingface_hub",
    "peft",
    "accelerate",
    "setuptools",
    "fsspec",
    "jinja2",
)
# stand-ins, in this order, for a package that a future version of a dependency no longer has
CANDIDATES = (
    "sympy.stats",
    "sympy.core",
    "sympy.solvers",
    "torch.utils",
    "torch.onnx",
    "torch._dynamo",
)
MAX_WORDS = 64
TEXTS_PER_CLASS = 400
MIN_TEXTS = 150
TEST_FRACTION = 0.25
SPLITS = ("text", "file")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Harvest:
    """Texts of the embedded task, before the split.

    `texts`, `labels` and `files` run in parallel; `files` are paths relative to the package's
    parent folder; `versions` maps top-level package to installed version.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    files: tuple[str, ...]
    label_names: tuple[str, ...]
    versions: dict[str, str]

    def is_test(self, split: str = "text") -> list[bool]:
        """Say for every text whether it is held out.

        "text": by the digest of the text, so a text never changes sides. "file": whole files, at
        least a quarter of each class's texts, taken in the order of the digests of their names.
        """
        if split == "text":
            return [_unit(f"split:{text}") < TEST_FRACTION for text in self.texts]
        if split != "file":
            raise UsageError(f"unknown split {split!r}; use one of: {', '.join(SPLITS)}")
        held_out: set[str] = set()
        for label in range(len(self.label_names)):
            sizes: dict[str, int] = {}
            for text_label, file in zip(self.labels, self.files, strict=True):
                if text_label == label:
                    sizes[file] = sizes.get(file, 0) + 1
            total, taken = sum(sizes.values()), 0
            for file in sorted(sizes, key=lambda f: _digest(f"split:{f}")):
                if taken >= TEST_FRACTION * total:
                    break
                # a file with most of the class in it would leave nothing to train on
                if taken + sizes[file] <= 0.4 * total:
                    held_out.add(file)
                    taken += sizes[file]
        return [file in held_out for file in self.files]

    def fingerprint(self, split: str = "text") -> str:
        """Return the SHA-256 hex digest over texts, labels, label names and the split."""
        rows = list(zip(self.texts, self.labels, self.is_test(split), strict=True))
        body = json.dumps([self.label_names, rows], ensure_ascii=False, separators=(",", ":"))
        return _digest(body)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _unit(text: str) -> float:
    return int(_digest(text)[:12], 16) / 16**12


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package or sub-package without importing it."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        folder = Path(location).joinpath(*rest)
        if folder.is_dir():
            return folder
    return None


def package_version(top: str) -> str:
    """Return the installed version of a top-level package, "none" where it has no metadata."""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def class_texts(name: str) -> dict[str, str]:
    """Return {text: file} of one package: at least 8 words, first 64, first occurrence wins."""
    folder = package_folder(name)
    found: dict[str, str] = {}
    if folder is None:
        return found
    base = folder.parents[name.count(".")]
    for path in ds.python_files(folder):
        file = path.relative_to(base).as_posix()
        for docstring in ds.docstrings(path.read_bytes()):
            words = ds.words_of(docstring, MAX_WORDS)
            if len(words) >= ds.MIN_WORDS:
                found.setdefault(" ".join(words), file)
    return found


def harvest(progress: Progress | None = None) -> Harvest:
    """Read the docstrings now, cache or no cache.

    Args:
        progress: called as `progress(done, total, package)` after each package.

    Raises:
        UsageError: a package is missing and no stand-in is left.
    """
    names: list[str] = []
    found: list[dict[str, str]] = []
    missing: list[str] = []
    queue = list(CLASSES)
    spare = list(CANDIDATES)
    while queue:
        name = queue.pop(0)
        texts = class_texts(name)
        if len(texts) >= MIN_TEXTS:
            names.append(name)
            found.append(texts)
            if progress is not None:
                progress(len(names), len(CLASSES), name)
            continue
        missing.append(name)
        if not spare:
            raise UsageError(
                f"the embedded task needs {len(CLASSES)} packages with at least {MIN_TEXTS} "
                f"docstrings each, and these are missing: {', '.join(missing)}; install the "
                "versions named in constraints.txt or give --dataset FILE"
            )
        logger.warning("embedded task: %s has too few docstrings, taking %s", name, spare[0])
        queue.insert(0, spare.pop(0))
    owners: dict[str, int] = {}
    for texts in found:
        for text in texts:
            owners[text] = owners.get(text, 0) + 1
    rows = []
    for label, texts in enumerate(found):
        own = sorted((t for t in texts if owners[t] == 1), key=_digest)[:TEXTS_PER_CLASS]
        rows.extend((text, label, texts[text]) for text in own)
    # classes interleaved by digest: no order by label for anything downstream to lean on
    rows.sort(key=lambda row: _digest(f"order:{row[0]}"))
    return Harvest(
        texts=tuple(r[0] for r in rows),
        labels=tuple(r[1] for r in rows),
        files=tuple(r[2] for r in rows),
        label_names=tuple(names),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    tops = sorted({name.split(".")[0] for name in (*CLASSES, *CANDIDATES)})
    return {top: package_version(top) for top in tops}


def cache_file() -> Path:
    """Return where the harvest of these versions and this code is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    code = b"".join(Path(m).read_bytes() for m in (ds.__file__, __file__))
    key = _digest(json.dumps(_versions(), sort_keys=True) + hashlib.sha256(code).hexdigest())
    return Path(root) / "fastrank" / f"packages20-{key[:16]}.json"


def _read_cache(path: Path) -> Harvest | None:
    try:
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("embedded task: cannot read cache %s (%s), harvesting again", path, error)
        return None
    try:
        digest, body = raw.split("\n", 1)
        if digest != _digest(body):
            raise ValueError("digest does not match")
        data = json.loads(body)
        return Harvest(
            texts=tuple(data["texts"]),
            labels=tuple(data["labels"]),
            files=tuple(data["files"]),
            label_names=tuple(data["label_names"]),
            versions=data["versions"],
        )
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("embedded task: cache %s is corrupted (%s), harvesting again", path, error)
        return None


def _write_cache(path: Path, data: Harvest) -> None:
    body = json.dumps(data.__dict__, ensure_ascii=False)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as handle:
            temporary = handle.name
            handle.write(f"{_digest(body)}\n{body}")
        os.replace(temporary, path)
    except OSError as error:
        logger.info("embedded task: cannot write cache %s (%s), going on without", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load_harvest(progress: Progress | None = None, *, cache: bool = True) -> Harvest:
    """Return the harvest, from the user's cache folder where it is up to date.

    The cache lies in `$XDG_CACHE_HOME/fastrank` (or `~/.cache/fastrank`), is written atomically,
    carries its own digest, and is rebuilt with a warning when that digest does not match. A folder
    that cannot be written costs the time of a harvest, nothing else.
    """
    if not cache:
        return harvest(progress)
    path = cache_file()
    data = _read_cache(path)
    if data is None:
        data = harvest(progress)
        _write_cache(path, data)
    return data
