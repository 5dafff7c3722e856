"""The example app for real: on Flower's simulation engine, and on a SuperLink with two SuperNodes.

Both have to end with the simulator's bits. Minutes each, most of them starting processes:

    pytest -m slow tests/federated/test_flower_engine.py          # with fastrank[flower] installed

Everything listens on loopback alone, and telemetry is off.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from loopback import plain, rows_of

BIN = Path(sys.executable).parent
APP = Path(__file__).parents[2] / "examples" / "flower_app"
SECONDS = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BIN / "flower-superlink").exists(),
        reason=f"no flower-superlink in {BIN}: pip install 'fastrank[flower]'",
    ),
]

METHOD_OPTIONS = {
    "hetlora": {"r": 4, "client_ranks": "2,4", "wire_dtype": "bfloat16"},
    "flora": {"r": 4, "client_ranks": "2,4"},
    "fedsa-lora": {"r": 4},
    "fedit": {"r": 4},
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def run(tiny_bert, csv_data, tmp_path, monkeypatch):
    """Starts Flower's programs, and runs the app with a method."""
    home, link = tmp_path / "home", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "loopback"\n\n'
        f'[superlink.loopback]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # by default its workers get what nobody else wants
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    started: list[subprocess.Popen] = []

    def start(name: str, *arguments: str) -> None:
        with (tmp_path / f"{name}-{len(started)}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [str(BIN / name), "--insecure", *arguments],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def superlink(*arguments: str) -> None:
        start("flower-superlink", "--host", "127.0.0.1", "--port", str(link),
              "--disable-runtime-dependency-installation", *arguments)  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{link}/health", timeout=2).close()
                return
            time.sleep(0.5)
        raise AssertionError((tmp_path / "flower-superlink-0.log").read_text()[-3000:])

    def supernode(config: str) -> None:
        start("flower-supernode", "--superlink", f"127.0.0.1:{link}", "--port", str(free_port()),
              "--node-config", config)  # fmt: skip

    def go(method: str, *arguments: str, **changed: object) -> dict:
        options = {
            "model": str(tiny_bert),
            "dataset": str(csv_data),
            "num_clients": 4,
            "clients_per_round": 3,
            "num_rounds": 2,
            "local_steps": 2,
            "num_threads": 1,
            "partition": "iid",
            "max_length": 16,
            "per_device_train_batch_size": 8,
            "method": method,
            **METHOD_OPTIONS[method],
            **changed,
        }
        given = {**options, "max_examples": "none", "max_eval_examples": "none"}
        pairs = " ".join(f"{key}={value}" for key, value in given.items())
        config = f'output-dir="{tmp_path}/remote" set="{pairs}"'
        done = subprocess.run(
            [str(BIN / "flwr"), "run", str(app), "loopback", "--stream", "--run-config", config,
             *arguments],
            env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        logs = "".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.log")))
        said = done.stdout[-5000:] + done.stderr[-3000:] + logs
        assert (tmp_path / "remote" / "summary.json").exists(), said
        return options

    app = shutil.copytree(APP, tmp_path / "app")  # flwr writes beside the sources
    go.superlink, go.supernode = superlink, supernode
    yield go
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
    for process in reversed(started):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started


def assert_same(options: dict, tmp_path: Path, *, result: bool = True, **own: object) -> None:
    plain(options, tmp_path, **own)
    assert rows_of(tmp_path / "remote") == rows_of(tmp_path / "plain")
    if result:
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_on_the_simulation_engine(run, tmp_path):
    run.superlink("--simulation")
    options = run("hetlora", "--federation-config",
                  "num-supernodes=4 client-resources-num-cpus=1")  # fmt: skip
    assert_same(options, tmp_path)


@pytest.mark.parametrize("method", ["flora", "fedsa-lora"])
def test_on_a_superlink_with_two_supernodes(method, run, tmp_path):
    run.superlink()
    run.supernode(f'partition-id=0 num-partitions=2 state-dir="{tmp_path}/node0"')
    run.supernode(f'clients="2-3" state-dir="{tmp_path}/node1"')
    options = run(method)
    assert_same(options, tmp_path, result=method != "fedsa-lora")
    assert any((tmp_path / "node0").iterdir())
    assert any((tmp_path / "node1").iterdir())


class Halves:
    """Every other row, as `partition` of the simulator takes it."""

    num_partitions = 2

    def load_partition(self, client):
        return range(client, 180, 2)


def test_silos_on_a_superlink(run, csv_data, tmp_path):
    header, *lines = (csv_data / "train.csv").read_text().splitlines()
    run.superlink()
    for i in range(2):
        own = tmp_path / f"silo{i}.csv"
        own.write_text("\n".join([header, *lines[i::2]]) + "\n")
        run.supernode(f'partition-id={i} num-partitions=2 dataset="{own}"'
                      f' state-dir="{tmp_path}/node{i}"')  # fmt: skip
    test = {"test_dataset": str(csv_data / "test.csv"), "num_clients": 2, "clients_per_round": 2}
    options = run("fedit", dataset="silos:birds,fish,trees", **test)
    del options["partition"]
    assert_same({**options, "dataset": str(csv_data)}, tmp_path, partition=Halves())
