"""Figures in README that nothing generates: a page with one of them could say anything.

What stands between markers (generated.py) comes from bench/results/. Outside of them no text may
say how many times as fast, how long, how large, or how many percent; what looks so and is no
measurement is listed here with the reason.
"""

from __future__ import annotations

import re

_GENERATED = re.compile(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", re.DOTALL)
_NUMBER = r"(?:\d[\d,]*(?:\.\d+)?|twice|half|two|three|four|five|ten|many|several|a tenth)"
# what a claim looks like; each match must be part of an allowed sentence
PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b{_NUMBER}\s+times\b",
        r"\d(?:\.\d+)?\s?[x×](?!\s?\d|\w)",  # 1.5x, but not 32 x 32
        rf"\b{_NUMBER}[\s-]+(?:ns|µs|us|ms|s|sec|seconds?|min|minutes?|hours?|days?)\b",
        rf"\b{_NUMBER}\s*(?:%|percent|points?)(?!\w)",
        rf"\b{_NUMBER}\s*(?:B|kB|MB|GB|TB|KiB|MiB|GiB|bytes?|bits?)\b",
        r"\b(?:faster|slower|speed-?ups?|as fast|as quick|quicker)\b",
        r"\b(?:twice|half|a third|a quarter|a tenth|a hundredth)\b",
        r"\baccuracy\s+(?:of\s+)?\d",
    )
)

# a sentence's words -> why they need no measurement
ALLOWED: dict[str, str] = {
    "trains a seeded 1 % of the weights": "the option density=0.01 in the same sentence",
    "| 1 % of the entries, then LoRA from their SVD |": "SLoRA's default density, an option",
    "3,072 each at 32 x 32,\n150,528 at 224 x 224 (9.0 GB for CIFAR-10)": (
        "3 x 32 x 32, 3 x 224 x 224, and 60,000 of the latter: arithmetic"
    ),
    "The fused call can be differentiated once, not twice.": "what can be done, no measurement",
    "its 4-bit and 8-bit layers": "bitsandbytes' names of its layers",
}


def claims(page: str) -> list[str]:
    """What README claims outside of the markers, line by line.

    Args:
        page: its text.

    Returns:
        "LINE: WORDS" of each claim, and "not in README any more: WORDS" of each allowed sentence
        that is gone.
    """
    rest = _GENERATED.sub(lambda m: "\n" * m[0].count("\n"), page)
    found = []
    for words in ALLOWED:
        if words not in rest:
            found.append(f"not in README any more: {words!r}")
        rest = rest.replace(words, "\n" * words.count("\n"))
    for number, line in enumerate(rest.splitlines(), start=1):
        matches = (match for pattern in PATTERNS for match in pattern.finditer(line))
        if spoken := sorted({match[0] for match in matches}):
            found.append(f"{number}: {', '.join(spoken)}: {line.strip()}")
    return found
