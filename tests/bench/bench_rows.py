"""Rows of a results file, made by hand."""

ENVIRONMENT = {"device": "here", "torch": "2", "threads": 1, "date": "today"}


def row(name="case", mode="full", **changes):
    found = {
        "bench": "lowrank",
        "case": {"name": name, "M": 1},
        "mode": mode,
        "variant": "fastrank",
        "baseline": "peft",
        "median_s": 1.0,
        "q20_s": 0.9,
        "q80_s": 1.1,
        "baseline_median_s": 2.0,
        "speedup": 2.0,
        "peak_bytes": 10,
        "baseline_peak_bytes": None,
        "error": 1e-7,
        "baseline_error": None,
    }
    return found | changes


def skipped(reason="peft: not installed", name="other"):
    identity = ("bench", "case", "mode", "variant", "baseline")
    return {key: row(name)[key] for key in identity} | {"skipped": reason}
