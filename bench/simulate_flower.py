"""The same federated job in Flower's simulation on Ray, and in fastrank's: seconds of a round.

Flower 1.41 and later: ServerApp with FedAvg, ClientApp with messages, one virtual node for each
client, all of them every round. An actor has one CPU: as many clients train at once as there are
threads, which suits small models better than Flower's default of two. Telemetry of both libraries
is off. Round 1, which starts the actors, is not counted.

Two apps:

- "flower-ray": a worker keeps the base model and every client's batches from one message to the
  next. None of Flower's own examples does; it is the least that Flower itself costs.
- "flower-ray-examples": a message loads the base model with from_pretrained and adapts it, as
  Flower's examples quickstart-huggingface and flowertune-llm do (github.com/adap/flower, March
  2026). Theirs read and tokenise the client's texts for every message, too, and flowertune-llm
  makes a Trainer; here the tokens are at hand.

Flower runs in a process of its own and not in turn with fastrank. Both send the values to every
client, train the same batches, collect and average; nothing is evaluated. The averages of round 1
must agree before a time is written.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrank.bench import harness, timing
from fastrank.bench.harness import Measured, WrongResult, first_line
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results
from fastrank.bench.simulate_cases import Job, SimCase, cases
from fastrank.bench.simulate_rounds import ROUND, TOLERANCE, PeftSequential, executor_name
from fastrank.federated.exchange import Exchange
from fastrank.federated.parallel import make_executor
from fastrank.federated.quiet import quiet

KEPT, BUILT = "flower-ray", "flower-ray-examples"
BASELINES = (KEPT, BUILT)
NOT_INSTALLED = "flwr is not installed (pip install 'fastrank[flower]')"
_CPU = torch.device("cpu")
_COLUMNS = (("case", 30), ("app", 20), ("flower ms a round", 17), ("fastrank ms a round", 19),
            ("ratio", 6))  # fmt: skip
_MOST_SECONDS = 900
# a main module's functions are pickled by value for every message, and their cache with them
_COMMAND = "from fastrank.bench import simulate_flower; simulate_flower.main()"


def measure(quick: bool, results: Results) -> None:
    """Measure the cases that the goals are about and that `results` lacks."""
    todo = cases(_CPU, quick)[: 1 if quick else 2]
    todo = [case for case in todo if not results.has(case.name, "round")]
    with Report(_COLUMNS) as report:
        report.start(len(todo) * len(BASELINES))
        for case in todo:
            found, executor = measure_case(case, rounds=3 if quick else 6)
            pairs = [("fastrank", baseline) for baseline in BASELINES]
            rows = harness.rows("simulate", case.as_dict(), "round", found, pairs)
            for row in rows:
                baseline = row["baseline"]
                if (reason := found[baseline].skipped) is not None:
                    row["skipped"] = reason
                    report.row([case.name, baseline, f"skipped: {reason}"])
                    continue
                row["executor"] = executor
                times = [milliseconds(row[key]) for key in ("baseline_median_s", "median_s")]
                report.row([case.name, baseline, *times, f"{row['speedup']:.1f}"])
            results.add(rows)


def why_not() -> str | None:
    """Why Flower's simulation can't run here, or None."""
    if importlib.util.find_spec("flwr") is None:
        return NOT_INSTALLED
    if importlib.util.find_spec("ray") is None:
        return "ray is not installed (pip install 'flwr[simulation]')"
    return None


def measure_case(case: SimCase, rounds: int) -> tuple[dict[str, Measured], str | None]:
    """Rounds of each, the same number, and the executor that fastrank chose."""
    reason = why_not()
    found = {name: Measured(skipped=reason) for name in BASELINES} | {"fastrank": Measured()}
    if reason is not None:
        return found, None
    start, average, ours, executor = _by_fastrank(case, rounds)
    found["fastrank"].timing = timing.Timing.of(ours)
    for name in BASELINES:
        try:
            their_average, theirs = _by_flower(case, start, rounds, name)
            apart = _distance(their_average, average, start)
            if not apart <= TOLERANCE:
                raise WrongResult(f"averages are {apart:.3g} apart, allowed is {TOLERANCE:g}")
            found[name].timing = timing.Timing.of(theirs)
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {first_line(error)}"
            found[name].skipped = f"{name}: failed: {words}"
    return found, executor


def _distance(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict) -> float:
    """Relative Frobenius distance of two updates from the same start."""
    gap = sum(float((found[n] - wanted[n]).double().square().sum()) for n in wanted)
    size = sum(float((wanted[n] - start[n]).double().square().sum()) for n in wanted)
    return (gap / size) ** 0.5


def _by_fastrank(
    case: SimCase, rounds: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], str]:
    """The start, the average after round 1, seconds of the other rounds, and the executor."""
    job = Job(case, _CPU)
    model, state = job.resident()
    executor = make_executor("auto", "auto", model, job.examples, job.partition, job.options())
    start, average, seconds = state.tensors, None, []
    for _ in range(rounds):
        begin = time.perf_counter()
        exchange = Exchange(job.method, state, ROUND, {})
        state, _metrics = job.method.aggregate(state, executor.run(exchange, job.clients), ROUND)
        seconds.append(time.perf_counter() - begin)
        average = state.tensors if average is None else average
    return start, average, seconds[1:], executor_name(executor)


def _by_flower(
    case: SimCase, start: dict[str, Tensor], rounds: int, name: str
) -> tuple[dict[str, Tensor], list[float]]:
    """The average after round 1, and seconds of the other rounds."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = {"case": asdict(case), "rounds": rounds, "threads": torch.get_num_threads()}
        if name == BUILT:
            with quiet():
                Job(case, _CPU).base().save_pretrained(folder / "base")
            task["base"] = str(folder / "base")
        (folder / "task.json").write_text(json.dumps(task))
        save_file(start, folder / "start.safetensors")
        environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-c", _COMMAND, place]
        with (folder / "log").open("w") as log:
            status = subprocess.run(
                command, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=_MOST_SECONDS,
            ).returncode  # fmt: skip
        if status or not (folder / "stamps.json").exists():
            lines = (folder / "log").read_text().strip().splitlines() or ["no output"]
            raise RuntimeError(f"Flower's process ended with status {status}: {lines[-1]}")
        stamps = json.loads((folder / "stamps.json").read_text())
        average = load_file(folder / "average.safetensors")
    return average, [after - before for before, after in pairwise(stamps)][1:]


# -- in Flower's process --------------------------------------------------------------------------


def main() -> None:
    """Run the task in the folder that the command line names; leaves stamps and average there."""
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from safetensors.torch import load_file, save_file

    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    clients, stamps = task["case"]["clients"], []

    def note(server_round: int, arrays: Any) -> None:
        if server_round == 1:
            save_file(arrays.to_torch_state_dict(), folder / "average.safetensors")
        stamps.append(time.perf_counter())

    def serve(grid: Any, context: Any) -> None:
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
        )
        strategy.start(
            grid,
            ArrayRecord(load_file(folder / "start.safetensors")),
            num_rounds=task["rounds"],
            train_config=ConfigRecord(
                {"case": json.dumps(task["case"]), "base": task.get("base", "")}
            ),
            evaluate_fn=note,
        )

    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(_train)
    server_app.main()(serve)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=clients,
        backend_config={
            "init_args": {"num_cpus": task["threads"], "log_to_driver": False},
            "client_resources": {"num_cpus": 1},
        },
    )
    (folder / "stamps.json").write_text(json.dumps(stamps))


@functools.lru_cache(maxsize=1)
def _kept(case: str) -> PeftSequential:
    """A worker's one model and its batches."""
    return PeftSequential(Job(SimCase(**json.loads(case)), _CPU))


@functools.lru_cache(maxsize=1)
def _job(case: str) -> Job:
    """A worker's tokens."""
    return Job(SimCase(**json.loads(case)), _CPU)


def _built(case: str, base: str, client: int) -> PeftSequential:
    """A model for this message alone, from the base's folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    job = _job(case)
    auto = AutoModelForCausalLM if job.task == "causal-lm" else AutoModelForSequenceClassification
    with quiet():
        return PeftSequential(job, auto.from_pretrained(base), [client])


def _train(message: Any, context: Any) -> Any:
    """A client's turn: values in, values out."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    case, base = (message.content["config"][key] for key in ("case", "base"))
    client = int(context.node_config["partition-id"])
    engine = _built(case, base, client) if base else _kept(case)
    values = engine.train(client, message.content["arrays"].to_torch_state_dict())
    count = len(engine.job.partition[client])
    reply = {"arrays": ArrayRecord(values), "metrics": MetricRecord({"num-examples": count})}
    return Message(RecordDict(reply), reply_to=message)
