"""Public names of a package that are loaded when they are first used (PEP 562)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def lazy(
    present: dict[str, Any], places: "Mapping[str, str]"
) -> "tuple[Callable[[str], Any], Callable[[], list[str]]]":
    """`__getattr__` and `__dir__` of a package whose public names are defined elsewhere.

        __getattr__, __dir__ = lazy(globals(), {"patch": "fastrank.patching"})

    Args:
        present: the package's globals; a name that was used is kept there.
        places: public name -> module that defines it.
    """

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {present['__name__']!r} has no attribute {name!r}")
        present[name] = value = getattr(importlib.import_module(places[name]), name)
        return value

    return load, lambda: sorted({*present, *places})
