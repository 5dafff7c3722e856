"""Text and tokenizer for pre-training the embedded encoder.

The text is every docstring of the listed packages and of the standard library, cleaned and masked
exactly as the embedded task's texts are, except docstrings that hold a test text of that task.
"""

import collections
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrank.data import docstrings as ds
from fastrank.data.harvest import Harvest, package_folder, package_version
from fastrank.errors import UsageError

# the task's packages in full, then whatever else a development install of fastrank brings
PACKAGES = (
    *("sympy", "networkx", "numpy", "mpmath", "torch", "transformers", "huggingface_hub"),
    *("peft", "accelerate", "setuptools", "fsspec", "jinja2", "triton", "tokenizers"),
    *("safetensors", "tqdm", "yaml", "regex", "packaging", "filelock", "psutil", "rich"),
    *("typer", "click", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "requests"),
    *("urllib3", "markdown_it", "pygments", "pydantic", "pydantic_core", "annotated_types"),
    *("annotated_doc", "typing_inspection", "markupsafe", "matplotlib", "mpl_toolkits", "PIL"),
    *("contourpy", "cycler", "fontTools", "kiwisolver", "pyparsing", "dateutil", "hypothesis"),
    *("pytest", "_pytest", "pluggy", "iniconfig", "sortedcontainers", "build", "wheel", "pip"),
    *("datasets", "pyarrow", "pandas", "sklearn", "scipy"),
)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
# rarer characters become [UNK]
MAX_LETTERS = 200
# documents with this digest, in hundredths, are held out to measure the loss
DEV_PERCENT = 1


@dataclass(frozen=True)
class Corpus:
    """Documents (masked words joined by blanks), the count left out, and where they came from."""

    documents: tuple[str, ...]
    excluded: int
    versions: dict[str, str]

    def fingerprint(self) -> str:
        """Return the SHA-256 hex digest over all documents."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def forbidden_texts(harvest: Harvest) -> list[str]:
    """Return the test texts of both splits of the embedded task."""
    by_text, by_file = harvest.is_test("text"), harvest.is_test("file")
    return [t for t, a, b in zip(harvest.texts, by_text, by_file, strict=True) if a or b]


class Exclusion:
    """Finds documents that contain one of the texts as a run of words, anywhere."""

    def __init__(self, texts: Iterable[str]) -> None:
        # every text has at least 8 words, so its first 8 serve as a key
        self._starting: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for text in texts:
            words = tuple(text.casefold().split())
            self._starting.setdefault(words[: ds.MIN_WORDS], []).append(words)

    def hits(self, document: str) -> bool:
        """Say whether the document contains a text; case is ignored, as the encoder ignores it."""
        words = tuple(document.casefold().split())
        for i in range(len(words) - ds.MIN_WORDS + 1):
            for text in self._starting.get(words[i : i + ds.MIN_WORDS], ()):
                if words[i : i + len(text)] == text:
                    return True
        return False


def _folders() -> Iterator[tuple[str, Path]]:
    for name in PACKAGES:
        folder = package_folder(name)
        if folder is not None:
            yield name, folder
    yield "python", Path(sysconfig.get_paths()["stdlib"])


def collect(harvest: Harvest) -> Corpus:
    """Read all installed packages of the list and the standard library."""
    exclusion = Exclusion(forbidden_texts(harvest))
    seen: dict[str, None] = {}
    versions: dict[str, str] = {}
    excluded: set[str] = set()
    for name, folder in _folders():
        versions[name] = (
            sysconfig.get_python_version() if name == "python" else package_version(name)
        )
        for path in ds.python_files(folder):
            for docstring in ds.docstrings(path.read_bytes()):
                words = ds.words_of(docstring)
                document = " ".join(words)
                if len(words) < ds.MIN_WORDS or document in seen or document in excluded:
                    continue
                if exclusion.hits(document):
                    excluded.add(document)
                else:
                    seen[document] = None
    return Corpus(tuple(seen), len(excluded), versions)


def is_dev(document: str) -> bool:
    """Say whether a document is held out of pre-training to measure the loss."""
    digest = hashlib.sha256(b"dev:" + document.encode("utf-8", "surrogatepass")).hexdigest()
    return int(digest[:8], 16) % 100 < DEV_PERCENT


def train_tokenizer(documents: Iterable[str], vocab_size: int):
    """Train a lower-casing BPE tokenizer; pieces inside a word carry the prefix "##".

    Returns:
        tokenizers.Tokenizer: with `[CLS] text [SEP]` as its template and ids 0 to 4 special.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    documents = list(documents)
    letters = collections.Counter()
    for document in documents:
        letters.update(normalizer.normalize_str(document))
    letters.pop(" ", None)
    alphabet = sorted(sorted(letters), key=letters.get, reverse=True)[:MAX_LETTERS]

    def assemble(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    options = {"unk_token": "[UNK]", "continuing_subword_prefix": CONTINUATION}
    scratch = assemble(models.BPE(**options))
    # the trainer numbers "##a", "##b", ... in the order of a randomly seeded hash map, and breaks
    # ties between merges by those numbers: hand them over as fixed tokens, then build the final
    # tokenizer from the vocabulary alone, where they are ordinary pieces
    pieces = [CONTINUATION + letter for letter in sorted(alphabet)]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *pieces],
        continuing_subword_prefix=CONTINUATION,
        initial_alphabet=sorted(alphabet),
        limit_alphabet=MAX_LETTERS,
        show_progress=False,
    )
    scratch.train_from_iterator(documents, trainer)
    trained = json.loads(scratch.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in trained["merges"]]
    tokenizer = assemble(models.BPE(vocab=trained["vocab"], merges=merges, **options))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def read_tokenizer(path: Path, vocab_size: int):
    """Read a tokenizer.json that `train_tokenizer` could have made.

    Raises:
        UsageError: no such file, not a tokenizer, another size or other special tokens.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # the library raises bare Exception for a malformed file
    except Exception as error:
        raise UsageError(f"cannot read tokenizer {path}: {error}") from error
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if tokenizer.get_vocab_size() > vocab_size or ids != list(range(len(SPECIAL_TOKENS))):
        raise UsageError(
            f"{path} has {tokenizer.get_vocab_size()} tokens with special ids {ids}; wanted at "
            f"most {vocab_size}, and {', '.join(SPECIAL_TOKENS)} as 0 to {len(SPECIAL_TOKENS) - 1}"
        )
    return tokenizer


def tokenizer_config(model_max_length: int) -> dict:
    """Return the tokenizer_config.json that belongs to `train_tokenizer`'s tokenizer."""
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **dict(zip(roles, SPECIAL_TOKENS, strict=True)),
    }


def chunks(tokenizer, documents: Iterable[str], length: int) -> list[np.ndarray]:
    """Cut documents into runs of at most `length` tokens, specials included.

    Returns:
        list of uint16 arrays `[n]`, `[CLS]` first and `[SEP]` last; tails under 8 tokens
        are left out.
    """
    cls, sep = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    body = length - 2
    found = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        ids = encoding.ids
        for start in range(0, len(ids), body):
            piece = ids[start : start + body]
            if len(piece) >= ds.MIN_WORDS:
                found.append(np.array([cls, *piece, sep], dtype=np.uint16))
    return found
