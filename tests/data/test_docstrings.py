"""Docstrings out of source: what is kept, what is dropped, what is masked."""

import pytest

from fastrank.data import docstrings as ds

SOURCE = b'''
"""Module text."""
import os

class A:
    """Class text."""

    def f(self):
        """Method text.

        Second line.
        """
        def inner():
            "Inner text in single quotes."

if os.name:
    async def g():
        """Guarded text."""
else:
    value = """not a docstring"""
'''


def test_docstrings_of_all_kinds_in_source_order() -> None:
    assert ds.docstrings(SOURCE) == [
        "Module text.",
        "Class text.",
        "Method text.\n\nSecond line.",
        "Inner text in single quotes.",
        "Guarded text.",
    ]


@pytest.mark.parametrize("source", [b'"""x"""\nprint "two"', b'"""x"""\x00', b'x = """', b""])
def test_source_that_does_not_parse_gives_nothing(source: bytes) -> None:
    assert ds.docstrings(source) == []


def test_clean_keeps_prose_alone() -> None:
    docstring = "\n".join(
        [
            "Adds `two` **numbers**, see https://example.org/x for more.",
            "======",
            "from math import pi",
            "import os as o",
            ">>> add(1, 2)",
            "3",
            "",
            "After the doctest, from here on.",
            "```python",
            "code()",
            "```",
            "    .. code-block:: python",
            "        more_code()",
            "",
            "    Last :class:`Thing` here.",
        ]
    )
    assert ds.clean(docstring) == (
        "Adds two numbers , see for more. After the doctest, from here on. Last Thing here."
    )


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("a PeftModel here", "a pkg Model here"),
        ("call get_peft_model_state_dict now", "call get pkg model state dict now"),
        ("uses torch.nn.Linear and peft.LoraModel", "uses pkg and pkg"),
        ("the HuggingFace Hub", "the pkg"),
        ("huggingface_hub.HfApi", "pkg"),
        ("NumPy, SymPy, NetworkX, PyTorch", "pkg, pkg, pkg, pkg"),
        ("torchvision and numpydoc", "pkg and pkg"),
        ("jinja2 templates", "pkg templates"),
        ("np.array and nx graphs", "pkg.array and pkg graphs"),
        ("a distributed matrix", "a pkg matrix"),
        ("the transformer attends", "the transformer attends"),
        ("annotations of any kind", "annotations of any kind"),
        ("torch torch", "pkg"),
    ],
)
def test_names_are_masked_after_identifiers_are_split(text: str, masked: str) -> None:
    assert ds.mask(text) == masked


def test_a_limit_gives_the_first_words_of_the_whole() -> None:
    docstring = " ".join(f"word{i} get_peft_model torch" for i in range(100))
    assert ds.words_of(docstring, 64) == ds.words_of(docstring)[:64]


def test_tests_and_vendored_folders_are_skipped(tmp_path) -> None:
    for name in ("b.py", "a.py", "test_a.py", "a_test.py", "conftest.py", "a.txt"):
        (tmp_path / name).write_text("")
    for folder in ("tests", "_vendor", ".hidden", "sub"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.py").write_text("")
    names = [p.relative_to(tmp_path).as_posix() for p in ds.python_files(tmp_path)]
    assert names == ["a.py", "b.py", "sub/c.py"]
