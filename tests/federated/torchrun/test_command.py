"""torchrun itself: `pytest -m slow tests/federated/torchrun/test_command.py`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import two_ranks
from rank_runs import assert_same_result, flags, into
from staged_runs import rows_of
from two_ranks import simulate

LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
import os
import two_ranks
from fastrank import cli
from fastrank.federated import config
plain = config.find_method
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    config.find_method = lambda name: two_ranks.hurt(plain(name).name, **{injury!r})
sys.exit(cli.main(sys.argv[1:]))
"""


def torchrun(*words, timeout=400):
    # torchrun is beside this Python
    launcher = Path(sys.executable).with_name("torchrun")
    if not launcher.exists():
        launcher = Path(shutil.which("torchrun"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [str(launcher), "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(
        line, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def reference(options, tmp_path):
    """Options, and the folder of a finished run of one process."""
    options = {**options, "method": "fedit", "num_rounds": 3}
    assert "error" not in simulate(into(options, tmp_path / "one"))
    return options, tmp_path / "one"


@pytest.fixture
def killing(tmp_path):
    """A script that is `fastrank` but for the second rank's end in round 2, the first time."""
    script = tmp_path / "killing.py"
    tests = str(Path(two_ranks.__file__).parent)
    script.write_text(LAUNCHED.format(tests=tests, injury={"kill": [1]}))
    return script


@pytest.mark.slow
def test_torchrun_from_the_command_line(reference, tmp_path):
    options, one = reference
    whole = torchrun("-m", "fastrank", "simulate", *flags(into(options, tmp_path / "whole")))
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("accuracy   ") == 1  # one process speaks
    assert rows_of(tmp_path / "whole") == rows_of(one)
    assert_same_result(tmp_path / "whole", one)
    refused = torchrun("-m", "fastrank", "simulate", "--num-rounds", "x")
    assert refused.stderr.count("fastrank: error:") == 1
    assert "num_rounds must be a whole number" in refused.stderr


@pytest.mark.slow
def test_torchrun_names_a_dead_rank_and_the_run_is_resumed(reference, killing, tmp_path):
    options, one = reference
    killed = torchrun(killing, "simulate", *flags(into(options, tmp_path / "killed")))
    assert killed.returncode == 1
    assert "go on with: torchrun --nproc-per-node 2 -m fastrank resume" in killed.stderr
    assert "Signal 9 (SIGKILL)" in killed.stderr
    resumed = torchrun("-m", "fastrank", "resume", tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_result(tmp_path / "killed", one)


@pytest.mark.slow
def test_torchrun_restarts_a_run_where_it_was(reference, killing, tmp_path):
    options, one = reference
    words = flags(into(options, tmp_path / "again"))
    again = torchrun("--max-restarts", "1", killing, "simulate", *words)
    assert again.returncode == 0, again.stderr
    assert_same_result(tmp_path / "again", one)
