"""The one command for a GPU: what runs, what a later call goes on with, how failures end."""

import json
import time

import bench_rows
import pytest
import torch

import fastrank.bench
from fastrank.bench import gpu, gpu_steps, gpu_summary
from fastrank.bench.results_file import Results, write_json

NAMES = ("first", "second", "third", "summary")


class Scripted:
    """Stands in for the processes: an exit status for each start of a step."""

    def __init__(self, **codes):
        self.codes = codes
        self.started = []

    def __call__(self, name, seconds, log):
        self.started.append(name)
        log.parent.mkdir(exist_ok=True)
        log.write_text(f"words of {name}\n")
        codes = self.codes.get(name, [0])
        return codes.pop(0) if len(codes) > 1 else codes[0]


def run(out, start, only=(), budget=1000.0):
    return gpu.run_all(out, start, NAMES, only, budget)


def statuses(out):
    return {name: step["status"] for name, step in _state(out).items()}


def _state(out):
    return json.loads((out / "state.json").read_text())["steps"]


def test_all_done_and_a_second_call_makes_the_summary_alone(tmp_path):
    start = Scripted()
    assert run(tmp_path, start) == 0
    assert start.started == list(NAMES)
    assert run(tmp_path, start) == 0
    assert start.started[4:] == ["summary"]
    assert _state(tmp_path)["first"]["last_line"] == "words of first"


def test_an_unfinished_step_stops_the_call_and_is_where_the_next_one_goes_on(tmp_path, capsys):
    start = Scripted(second=[gpu.UNFINISHED, gpu.UNFINISHED, 0])
    assert run(tmp_path, start) == gpu.UNFINISHED
    assert "go on with" in capsys.readouterr().out
    assert run(tmp_path, start) == gpu.UNFINISHED
    assert run(tmp_path, start) == 0
    assert start.started == ["first", "second", "second", "second", "third", "summary"]


def test_a_failure_is_recorded_and_the_next_step_runs(tmp_path):
    start = Scripted(second=[1])
    assert run(tmp_path, start) == 1
    assert start.started == list(NAMES)
    assert statuses(tmp_path)["second"] == "failed"
    # not again by itself, and the status still says so
    assert run(tmp_path, start) == 1
    assert start.started[4:] == ["summary"]
    start.codes["second"] = [0]
    assert run(tmp_path, start, only=["second"]) == 0
    assert statuses(tmp_path)["second"] == "done"


def test_nothing_begins_without_time(tmp_path, capsys):
    start = Scripted()
    assert run(tmp_path, start, budget=5.0) == gpu.UNFINISHED
    assert start.started == []
    assert "time is up" in capsys.readouterr().out


def test_a_lost_device_gets_a_new_process(tmp_path):
    start = Scripted(second=[gpu._DEVICE_LOST, gpu._DEVICE_LOST, 0])
    assert run(tmp_path, start) == 0
    assert start.started.count("second") == 3
    start = Scripted(second=[gpu._DEVICE_LOST])
    (tmp_path / "again").mkdir()
    assert run(tmp_path / "again", start) == 1
    assert statuses(tmp_path / "again")["second"] == "failed"


def test_a_step_that_has_to_be_stopped_twice_has_failed(tmp_path):
    start = Scripted(second=[None])
    assert run(tmp_path, start) == gpu.UNFINISHED
    assert statuses(tmp_path)["second"] == "stopped"
    assert run(tmp_path, start) == 1
    assert statuses(tmp_path) == dict.fromkeys(NAMES, "done") | {"second": "failed"}


def test_skipped_is_no_failure(tmp_path):
    assert run(tmp_path, Scripted(second=[gpu._SKIPPED])) == 0
    assert statuses(tmp_path)["second"] == "skipped"


def test_a_damaged_state_is_refused(tmp_path, capsys):
    (tmp_path / "state.json").write_text("{")
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (False, gpu.UNFINISHED),
        (gpu_steps.Skipped("no"), gpu._SKIPPED),
        (gpu_steps.Failed("bad"), gpu._FAILED),
        (RuntimeError("crash"), gpu._FAILED),
    ],
)
def test_how_a_step_ends_is_its_exit_status(tmp_path, monkeypatch, raised, code, capsys):
    def step(out, setting, deadline):
        assert setting.rehearsal
        assert setting.budget == 500.0
        assert 0 < deadline - time.monotonic() <= 100
        if isinstance(raised, Exception):
            raise raised
        return raised is None

    monkeypatch.setitem(gpu_steps.STEPS, "matmul", step)
    assert gpu.run_step("matmul", tmp_path, "cpu", 500.0, 100.0) == code


def test_bad_input(tmp_path, capsys):
    assert gpu.main(["--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path), "--only", "nothing"]) == 2
    assert "choose from environment" in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--budget", "0"]) == 2
    if not torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path)]) == 2
        assert "--device cpu" in capsys.readouterr().err


def test_every_benchmark_is_a_step():
    ops = {name for name in fastrank.bench.BENCHES if name != "all"}
    assert ops <= gpu_steps.STEPS.keys()
    assert list(gpu_steps.STEPS)[-1] == "summary"


def test_list_names_every_step(tmp_path, capsys):
    assert gpu.main(["--list", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_steps.STEPS)
    assert all("[not begun]" in line for line in lines)


def test_rates_and_summary_of_a_rehearsal(tmp_path):
    setting = gpu_steps.Setting("cpu", 100.0)
    later = time.monotonic() + 100
    for name in ("environment", "bandwidth", "matmul"):
        assert gpu_steps.STEPS[name](tmp_path, setting, later)
    assert json.loads((tmp_path / "bandwidth.json").read_text())["bytes_per_second"] > 1e8
    assert gpu_steps.summarise(tmp_path, setting, later)
    page = (tmp_path / "README.md").read_text()
    assert torch.__version__ in page
    assert "GB/s" in page
    assert "TFLOP/s" in page


def test_steps_that_take_long_stop_at_the_deadline(tmp_path):
    setting = gpu_steps.Setting("cpu", 100.0)
    for name in ("tests", "lowrank-shipped", "lowrank", "rank-sweep", "train-step", "grouped",
                 "packing", "simulate-memory", "simulate-profile"):  # fmt: skip
        assert gpu_steps.STEPS[name](tmp_path, setting, time.monotonic() - 1) is False, name


def test_tests_are_run_file_by_file(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    for name, line in (("good", "assert True"), ("bad", "assert False"), ("none", "pass")):
        mark = "" if name == "none" else "@pytest.mark.gpu\n"
        (root / "tests").mkdir(parents=True, exist_ok=True)
        file = root / "tests" / f"test_{name}.py"
        file.write_text(f"import pytest\n{mark}def test_it():\n    {line}\n")
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: here\n")
    monkeypatch.setattr(gpu_steps, "ROOT", root)
    setting, later = gpu_steps.Setting("cpu", 100.0), time.monotonic() + 100
    with pytest.raises(gpu_steps.Failed, match=r"tests/test_bad\.py"):
        gpu_steps.run_tests(tmp_path, setting, later)
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["tests/test_good.py"]["line"].startswith("1 passed")
    assert found.keys() == {"tests/test_good.py", "tests/test_bad.py"}
    assert "assert False" in (tmp_path / "logs" / "test_bad.log").read_text()

    (root / "tests" / "test_bad.py").write_text("import pytest\npytestmark = pytest.mark.gpu\n")
    gpu_steps.forget_failures(tmp_path, "tests")
    assert gpu_steps.run_tests(tmp_path, setting, later)


def test_a_file_of_tests_gets_a_whole_call_before_it_counts_as_endless(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "tests" / "test_one.py").write_text("import pytest\npytestmark = pytest.mark.gpu\n")
    monkeypatch.setattr(gpu_steps, "ROOT", root)
    monkeypatch.setattr(gpu_steps, "_run_tests_of", lambda *arguments: None)
    later = time.monotonic() + 100
    assert gpu_steps.run_tests(tmp_path, gpu_steps.Setting("cpu", 500.0), later) is False
    assert not (tmp_path / "tests.json").exists()
    with pytest.raises(gpu_steps.Failed, match="test_one"):
        gpu_steps.run_tests(tmp_path, gpu_steps.Setting("cpu", 110.0), later)


def row(**changes):
    case = {"name": "c", "M": 8192, "K": 4096, "N": 4096, "R": 16, "dtype": "bfloat16",
            "dropout": 0.0, "bias": False, "precision": "16-bit"}  # fmt: skip
    return bench_rows.row() | {"case": case} | changes


def test_measured_against_predicted():
    rows = [
        row(variant="peft", baseline="frozen", median_s=1.3e-3, baseline_median_s=1e-3),
        row(variant="fastrank", baseline="frozen", median_s=1.1e-3, baseline_median_s=1e-3),
        row(variant="fastrank", baseline="peft"),
    ]
    found = gpu_summary.compare_with_roofline(rows, 0.72 * 989e12, 0.85 * 4.8e12)
    by = {entry["variant"]: entry for entry in found}
    assert [entry["variant"] for entry in found] == ["frozen", "peft", "fastrank"]
    assert by["frozen"]["predicted_s"] == pytest.approx(0.772e-3, rel=1e-3)
    assert by["frozen"]["measured_s"] == 1e-3
    assert by["peft"]["predicted_overhead"] == pytest.approx(0.34, abs=0.005)
    assert by["peft"]["measured_overhead"] == pytest.approx(0.3)
    assert by["fastrank"]["predicted_overhead"] == pytest.approx(0.064, abs=0.005)


def test_failed_rows_are_measured_again_when_asked(tmp_path):
    failed = {k: v for k, v in row().items() if k in ("bench", "mode", "variant", "baseline")}
    failed |= {"case": {"name": "d"}, "skipped": "peft: failed: RuntimeError: broken"}
    path = tmp_path / "lowrank.json"
    environment = {"device": "here"}
    Results(path, environment).add([row(), failed])
    gpu_steps.forget_failures(tmp_path, "lowrank")
    kept = Results(path, environment, resume=True)
    assert kept.has("c", "full")
    assert not kept.has("d", "full")
    gpu_steps.forget_failures(tmp_path, "environment")  # nothing there is nothing to do
    write_json(tmp_path / "matmul.json", {"flops_per_second": 1.0})
    gpu_steps.forget_failures(tmp_path, "matmul")


@pytest.mark.slow
def test_rehearsal_runs_every_step_and_resumes(tmp_path):
    """With a budget too small for all of it the same command reaches the end in several calls."""
    codes = []
    while not codes or (codes[-1] == gpu.UNFINISHED and len(codes) < 12):
        codes.append(gpu.main(["--out", str(tmp_path), "--device", "cpu", "--budget", "45"]))
    assert codes[-1] == 0
    done = statuses(tmp_path)
    skipped = {"tune": "skipped", "static": "skipped"}
    assert done == dict.fromkeys(gpu_steps.STEPS, "done") | skipped
    page = (tmp_path / "README.md").read_text()
    for heading in ("Machine", "rates", "Tests", "One layer", "roofline", "pruned", "training",
                    "one pass", "SVD", "Sparse updates", "side by side", "memory", "made of",
                    "Peers"):  # fmt: skip
        assert heading in page
