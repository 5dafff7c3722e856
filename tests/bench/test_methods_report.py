"""The results page of the methods: what its tables and verdicts say of known runs."""

import json
import sys
from pathlib import Path

import pytest

from fastrank.bench import generated, methods_report
from fastrank.errors import UsageError

sys.path.append(str(Path(__file__).resolve().parents[1] / "federated"))
from fabricated_runs import fabricate, ledger_row

PAGE = "\n".join(
    ["# Methods", "By hand."]
    + [
        f"<!-- begin {name} -->\nSTALE\n<!-- end {name} -->"
        for name in ("counts", "tuning", "claims", "options", "common-0-1", "common-1",
                     "common-100", "gaps", *methods_report.PRESETS[2:])
    ]
)  # fmt: skip


def _rows(accuracies, payload):
    return [
        ledger_row(i, a, payload_up=payload, payload_down=payload, bytes_up=payload + 9,
                   bytes_down=payload + 9, head_up=10, head_down=10)
        for i, a in enumerate(accuracies, start=1)
    ]  # fmt: skip


@pytest.fixture
def records(tmp_path):
    """FedAvg, FedIT, FedARA and SA-FedLoRA at alpha 0.1 with two seeds, and a tuning."""
    folder = tmp_path / "methods"
    runs = folder / "common" / "runs"
    final = {"fedavg": (0.50, 0.60), "fedit": (0.40, 0.52), "fedara": (0.41, 0.50),
             "sa-fedlora": (0.52, 0.61)}  # fmt: skip
    payload = {"fedavg": 100_010, "fedit": 4810, "fedara": 2010, "sa-fedlora": 5000}
    for method, scores in final.items():
        for seed, score in enumerate(scores):
            own = {"r": 12} if method == "fedit" else {}
            fabricate(runs / f"{method}-{seed}", [0.1, 0.3, score], method=method, alpha=0.1,
                      seed=seed, rows=_rows([0.1, 0.3, score], payload[method]), **own)  # fmt: skip
    for rate, score in ((1e-3, 0.30), (3e-3, 0.35), (9e-3, 0.20)):
        fabricate(folder / "tuning" / "runs" / f"fedit-{rate}", [score], method="fedit", seed=100,
                  learning_rate=rate)  # fmt: skip
    folder.with_suffix(".md").write_text(PAGE)
    return folder


def _cells(block, start):
    """The cells of the row that begins so."""
    row = next(line for line in block.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_accuracies_are_paired_by_seed(records):
    block = methods_report.blocks(records)["common-0-1"]
    titles = _cells(block, "method")
    row = dict(zip(titles, _cells(block, "`fedara`"), strict=True))
    assert row["accuracy %"] == "45.5 ± 6.4"
    assert row["against fedit"] == "-0.5 ± 2.1"  # (+1, -2)
    assert row["against fedavg"] == "-9.5 ± 0.7"  # (-9, -10)
    assert row["of fedavg's"] == f"{100 * 2010 / 100_010:.3g} %"
    # 90 % of 56.5: one seed of SA-FedLoRA's and of FedAvg's
    goal = f"rounds to {90 * 0.565:.1f} %"
    assert row[goal] == "never"
    sa = dict(zip(titles, _cells(block, "`sa-fedlora`"), strict=True))
    assert sa[goal] == "3"
    whole = dict(zip(titles, _cells(block, "`fedavg`"), strict=True))
    assert whole[goal] == "3 (1 of 2)"


def test_gaps_to_full_fine_tuning_follow_the_rounds(records):
    block = methods_report.blocks(records)["gaps"]
    titles = _cells(block, "method")
    assert titles[2:] == ["rounds 1 to 1", "rounds 2 to 2", "rounds 3 to 3"]
    row = dict(zip(titles, _cells(block, "`fedara`"), strict=True))
    assert row["alpha"] == "0.1"
    assert row["rounds 1 to 1"] == "+0.0 ± 0.0"
    assert row["rounds 3 to 3"] == "-9.5 ± 0.7"
    assert "`fedavg`" not in block


def test_verdicts_follow_the_means(records):
    rows = methods_report.blocks(records)["claims"].splitlines()
    verdict = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows}
    assert verdict["FedARA: at least FedIT's accuracy of the same first rank, alpha 0.1"] == (
        "**not met**"
    )
    assert verdict["FedARA: adapter bytes at most 1/2.40 of FedIT's"] == "met"  # 4800 / 2000
    assert verdict["SA-FedLoRA: at least FedAvg's accuracy, alpha 0.1"] == "met"
    saved = next(name for name in verdict if "93.62" in name)
    assert verdict[saved] == "met"  # 1 - 5000 / 100010 = 95.0 %
    assert not any(name.startswith(("SLoRA", "Fed-PLoRA")) for name in verdict)  # no such runs


def test_the_best_rate_is_bold(records):
    assert "0.001: 30.0; **0.003: 35.0**; 0.009: 20.0" in methods_report.blocks(records)["tuning"]


def test_the_page_is_written_once(records):
    arguments = ["--records", str(records)]
    assert methods_report.main([*arguments, "--check"]) == 1
    assert "STALE" in records.with_suffix(".md").read_text()
    assert methods_report.main(arguments) == 0
    page = records.with_suffix(".md").read_text()
    assert "STALE" not in page
    assert page.startswith("# Methods\nBy hand.\n")
    assert methods_report.main([*arguments, "--check"]) == 0


def test_the_switch_is_reported(records):
    for seed, kept in ((0, 0.05), (1, 0.07)):
        path = fabricate(records / "common" / "runs" / f"slora-{seed}", [0.1, 0.5, 0.55],
                         method="slora", alpha=0.1, seed=seed,
                         rows=_rows([0.1, 0.5, 0.55], 1400))  # fmt: skip
        noted = {"round": 2, "accuracy_before_switch": 0.3, "accuracy_after_switch": 0.2,
                 "switch_energy": kept}  # fmt: skip
        (path / "metrics.jsonl").write_text(json.dumps(noted) + "\n")
    rows = methods_report.blocks(records)["claims"]
    assert "30.0 ± 0.0 %, then 20.0 ± 0.0 %; the SVD keeps 6.0 ± 1.4 %" in rows
    assert _cells(rows, "SLoRA: within 1 point")[1:] == ["+0.0 ± 7.1 points", "met"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin a -->\n", "don't pair up: a"),
        ("<!-- begin b -->\n<!-- end b -->", "differ in a, b"),
        ("<!-- begin a -->\n<!-- end a -->\n" * 2, "there twice"),
    ],
)
def test_markers_are_checked(text, message):
    with pytest.raises(UsageError, match=message):
        generated.replace(text, {"a": "x"})


def test_the_committed_page_is_up_to_date():
    page = methods_report.RECORDS.with_suffix(".md")
    assert not generated.update(page, methods_report.blocks(methods_report.RECORDS), check=True)
