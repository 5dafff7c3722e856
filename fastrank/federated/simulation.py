"""The round loop.

    simulation = Simulation(method="fedit", num_clients=100, clients_per_round=10, num_rounds=50)
    result = simulation.run()                    # or Simulation.resume("runs/...")

A round: cohort, downlink, local training, uplink, guard, aggregation, evaluation, ledger row,
checkpoint. Every random choice is a pure function of (seed, round, client), so a resumed run needs
no generator state and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrank.errors import UsageError
from fastrank.federated import rundir
from fastrank.federated.averaging import Summed
from fastrank.federated.callbacks import Callback
from fastrank.federated.checkpoint import Checkpoint, load_latest, save_checkpoint
from fastrank.federated.client_states import ClientStates
from fastrank.federated.conditions import Conditions
from fastrank.federated.config import Config, resolve
from fastrank.federated.generation import with_prompts
from fastrank.federated.ledger import Ledger, Meter
from fastrank.federated.local import evaluate, evaluate_in_turn
from fastrank.federated.methods.base import Method, Run, ServerState, Update, mean_of
from fastrank.federated.model import ResidentModel, load_resident
from fastrank.federated.parallel import make_executor
from fastrank.federated.preparing import load, local_options, split
from fastrank.federated.reporting import make_reporters
from fastrank.federated.storage import storing
from fastrank.federated.world import join

if TYPE_CHECKING:
    from fastrank.data import TextData


@dataclass(frozen=True)
class RunResult:
    """What a run came to: the summary, the ledger's rows, the folder and the trained model."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    output_dir: Path
    model: ResidentModel


class Simulation:
    """Federated fine-tuning of one transformers model by one method.

        >>> simulation = fastrank.Simulation(method="fedara", num_clients=100, alpha=0.1)
        >>> simulation.config.clients_per_round, simulation.method.name
        (4, 'fedara')

    ``simulation.run()`` loads data and model, trains, and returns a ``RunResult``.

    Args:
        config: a ``Config``; or leave it out and give its fields, and the method's, as keywords.
        method: a ``Method`` instance when ``config`` is given (``resolve`` makes the pair; a class
            of your own needs no registration).
        data: a ``TextData`` to use instead of loading ``config.dataset``.
        partition: any object with ``num_partitions`` and ``load_partition(i)``, instead of
            ``config.partition``; a ``Population`` (population.py), or an object with more than
            20,000 partitions, is never listed.
        callbacks: told of every stage and round.

    Under torchrun every process makes the same simulation: they share each round's clients, and the
    first alone writes, prints and has callbacks (torchrun.py).

    Raises:
        UsageError: an option, a file, a model or a partition that can't work; raised by the
            constructor or by ``prepare``, before any training.
    """

    def __init__(
        self,
        config: Config | None = None,
        method: Method | str | None = None,
        *,
        data: TextData | None = None,
        partition: Any = None,
        callbacks: Iterable[Callback] = (),
        **options: Any,
    ) -> None:
        if isinstance(partition, str):
            options["partition"], partition = partition, None
        if config is None:
            config, method = resolve(options if method is None else {**options, "method": method})
        elif options or method is None:
            raise TypeError("give either config and method, or options by keyword, not both")
        Conditions.check(config, method)
        dataset = config.dataset if data is None else data.name
        self.config = dataclasses.replace(config, method=method.name, dataset=dataset)
        self.method = method
        self.world = join()
        self.callbacks = [*make_reporters(config.report_to), *callbacks] if self.world.first else []
        self.data, self._partition = data, partition
        self.output_dir = Path(config.output_dir or rundir.default_name(config.method))
        self.device = find_device(self.world.place(config.device))

    # -- set-up ----------------------------------------------------------------------------------

    def prepare(self) -> ServerState:
        """Load data and model, split, encode, and let the method initialise; nothing is written."""
        config = self.config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if self.data is None:
            self._tell("on_stage", f"loading data: {config.dataset}")
            self.data = load(config, lambda *progress: self._tell("on_progress", *progress))
        self._tell("on_stage", f"loading model: {config.model}")
        self.model = load_resident(
            config.model,
            self.data,
            seed=config.seed,
            device=self.device,
            dtype=getattr(torch, config.dtype),
            max_length=config.max_length,
        )
        self.train, self.test = self.model.encode(
            [self.data.train, self.data.test],
            config.max_length,
            lambda *progress: self._tell("on_progress", *progress),
        )
        if config.eval_metric == "rouge-l":
            self.test = with_prompts(
                self.model,
                self.data.test,
                self.test,
                max_length=config.max_length,
                max_new_tokens=config.max_new_tokens,
                num_beams=config.generation_num_beams,
            )
        self.config, self.partition = split(config, self.data.train, self.train, self._partition)
        run = Run(config.num_rounds, len(self.partition), config.clients_per_round, config.seed)
        options = local_options(config)
        self.conditions = Conditions(config, self.partition, options)
        self.method = dataclasses.replace(self.method.in_run(run), rule=self.conditions.rule)
        state = self.method.init(self.model, config.seed)
        self.executor = make_executor(
            config.executor,
            config.clients_in_parallel,
            self.model,
            self.train,
            self.partition,
            options,
            self.world,
            config.clients_per_round,
        )
        return state

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the run's bits, as config.json holds it (after ``prepare``)."""
        return rundir.describe(self)

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run from the start; the output folder must be new or empty."""
        try:
            with self.world.together():
                self._meet()
                if self.world.first:
                    rundir.refuse_occupied(self.output_dir)
                state = self.prepare()
                now = self.resolved()
                self.world.agree(now)
                if self.world.first:
                    rundir.create(self.output_dir, now)
                start = self._evaluate(state, None)
                facts = initial_facts(start)
                return self._go(Checkpoint(0, state, {}, [], facts))
        finally:
            self._tell("close")

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        *,
        method: type[Method] | str | None = None,
        data: TextData | None = None,
        partition: Any = None,
        callbacks: Iterable[Callback] = (),
        **options: Any,
    ) -> RunResult:
        """Go on after the last whole checkpoint of a run.

        Args:
            method: the class of a method that fastrank doesn't know by name.
            data, partition: the objects the run was started with, if it was.
            options: as at the start; only those that decide no bits may differ
                (`rundir.FREE_OPTIONS`).

        Raises:
            UsageError: no run there, a finished one, or data, options and versions that would
                change it.
        """
        if isinstance(partition, str):  # names are options
            options["partition"], partition = partition, None
        if isinstance(method, str):
            options["method"], method = method, None
        saved = rundir.changed_options(rundir.read(Path(run_dir)), options, method)
        options = {**saved["options"], "output_dir": str(run_dir)}
        self = cls(
            *resolve(options, method=method), data=data, partition=partition, callbacks=callbacks
        )
        try:
            with self.world.together():
                self._meet()
                state = self.prepare()
                now = self.resolved()
                self.world.agree(now)
                rundir.check_same(saved, now, self.output_dir)
                if self.world.first:
                    with storing(self.output_dir):
                        rundir.mend(self.output_dir, now)
                checkpoint = load_latest(self.output_dir)
                if checkpoint is None:  # killed before the first round was over
                    start = self._evaluate(state, None)
                    facts = initial_facts(start)
                    checkpoint = Checkpoint(0, state, {}, [], facts)
                return self._go(checkpoint)
        finally:
            self._tell("close")

    def _meet(self) -> None:
        """Meet the other processes of the run, if there are any."""
        config, folder = self.config, str(self.output_dir)
        wait, cohort = config.collective_timeout, config.clients_per_round
        self.output_dir = Path(self.world.begin(folder, self.device, wait, cohort))

    def _go(self, checkpoint: Checkpoint) -> RunResult:
        config, method = self.config, self.method
        state = checkpoint.state
        clients = ClientStates.of(self.output_dir, checkpoint.client_states)
        if self.world.first:
            clients.drop_after(checkpoint.rounds_done)
        ledger, meter = Ledger(checkpoint.rows), Meter(self.device)
        facts = dict(checkpoint.facts)
        self.executor.restore(facts)
        self._tell("on_start", self, checkpoint.rounds_done)
        for t in range(checkpoint.rounds_done, config.num_rounds):
            began, before = time.perf_counter(), state
            self.world.doing = f"round {t + 1}"
            meter.start()
            cohort = self.conditions.cohort(t)
            self._tell("on_round_start", t + 1, cohort)
            clients.read_ahead(cohort)
            state, noted = self._switched(state, t)
            method.arrange(self.model, state, t)
            exchange = self.conditions.exchange(method, state, t, clients, cohort)
            seen: list[tuple[float, int]] = []  # (train loss, examples) of each valid update
            running = self.executor.run(exchange, cohort, lambda c: self._tell("on_client", c))
            updates = watched(running if cohort else (), seen)
            first = next(updates, None)
            if first is None:  # every client was dropped and the state stays
                state, metrics = self.conditions.nobody(method, state, exchange)
            else:
                arrived = itertools.chain([first], updates)
                state, metrics = self.conditions.aggregate(method, state, arrived, t)
            noted |= metrics | self.conditions.record(exchange)
            if noted:
                facts.setdefault("metrics", []).append({"round": t + 1, **noted})
                self._tell("on_recorded", t + 1, noted)
            last = t + 1 == config.num_rounds
            score = {"loss": None, "accuracy": None}
            if last or (t + 1) % config.eval_every == 0:
                limit = None if last else config.max_eval_examples
                score = self._evaluate(state, limit, clients)
            traffic = dataclasses.asdict(exchange.traffic)
            memory, energy = self.world.close_round(
                before, state, meter.peak_memory(), meter.energy_j()
            )
            row = ledger.add(
                round=t + 1,
                train_loss=weighted_average(seen),
                eval_loss=score["loss"],
                accuracy=score["accuracy"],
                clients=len(cohort),
                dropped=len(exchange.dropped),
                trainable_params=method.trainable_params(state),
                seconds=round(time.perf_counter() - began, 3),
                peak_memory=memory,
                energy_j=energy,
                rouge_l=score.get("rouge_l"),
                **traffic,
            )
            facts |= self.executor.facts()
            checkpoint = Checkpoint(t + 1, state, clients, ledger.rows, facts)
            if self.world.first and (last or (t + 1) % config.checkpoint_every == 0):
                with storing(self.output_dir):
                    save_checkpoint(self.output_dir, checkpoint, config.keep_checkpoints)
                    ledger.write(self.output_dir / "rounds.csv")
            self._tell("on_round_end", row)
        return self._finish(checkpoint)

    def _finish(self, checkpoint: Checkpoint) -> RunResult:
        state = checkpoint.state
        self.world.doing, without = "the end of the run", None
        zeroed = self.method.without_adapters(state)
        if zeroed is not None:
            self._tell("on_stage", "evaluating with the adapters zeroed")
            without = self._evaluate(dataclasses.replace(state, tensors=zeroed), None)["accuracy"]
        if own := self.method.personal(state, checkpoint.client_states):
            state = dataclasses.replace(state, tensors=mean_of(own))
        self.method.finish(self.model, state)
        summary = None
        if self.world.first:
            with storing(self.output_dir):
                summary = rundir.finish(self, checkpoint, without)
        summary = self.world.share(summary)
        self._tell("on_end", summary)
        return RunResult(summary, checkpoint.rows, self.output_dir, self.model)

    def _switched(self, state: ServerState, t: int) -> tuple[ServerState, dict[str, Any]]:
        """The state after the server's change of form, if round t begins with one, and its record.

        The whole test set is read before and after: what a change costs is the point of the record.
        """
        if not self.method.switches(t):
            return state, {}
        before = self._evaluate(state, None)
        state, metrics = self.method.switch(self.model, state, t)
        after = self._evaluate(state, None)
        scores = {
            f"{key}_{side}_switch": score[key]
            for side, score in (("before", before), ("after", after))
            for key in ("accuracy", "loss")
        }
        return state, {**scores, **metrics}

    def _evaluate(
        self, state: ServerState, limit: int | None, clients: Mapping[int, Any] | None = None
    ) -> dict[str, float]:
        size = self.config.per_device_eval_batch_size
        self.method.show(self.model, state)
        if own := self.method.personal(state, clients or {}):
            return evaluate_in_turn(self.model, own, self.test, size, limit, self.world.map)
        return evaluate(self.model, self.test, size, limit, each=self.world.map)

    def _tell(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*args)


def watched(updates: Iterable[Update], seen: list[tuple[float, int]]) -> Iterator[Update]:
    """Pass updates on and note each one's loss and weight."""
    for update in updates:
        if isinstance(update, Summed):
            seen.extend(update.losses)
        else:
            seen.append((update.train_loss, update.num_examples))
        yield update


def initial_facts(score: Mapping[str, float]) -> dict[str, float]:
    """What the run records of the model before the first round."""
    names = {"accuracy": "initial_accuracy", "loss": "initial_loss", "rouge_l": "initial_rouge_l"}
    return {name: score[key] for key, name in names.items() if key in score}


def weighted_average(seen: list[tuple[float, int]]) -> float | None:
    """Mean loss over examples; None if every update was dropped."""
    weight = sum(count for _, count in seen)
    return sum(loss * count for loss, count in seen) / weight if weight else None


def find_device(name: str) -> torch.device:
    """The device of that name ("auto": CUDA if there is one).

    Raises:
        UsageError: a name torch doesn't know, or a device that isn't there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r} was asked for but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use --device cpu, or auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device
