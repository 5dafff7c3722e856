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
from fastrank.federated.callbacks import Callback
from fastrank.federated.checkpoint import Checkpoint, load_latest, save_checkpoint
from fastrank.federated.cohort import sample_cohort
from fastrank.federated.config import Config, resolve
from fastrank.federated.exchange import Exchange
from fastrank.federated.ledger import Ledger, Meter
from fastrank.federated.local import LocalOptions, evaluate, evaluate_in_turn
from fastrank.federated.methods.base import Method, Run, ServerState, Update, mean_of
from fastrank.federated.model import ResidentModel, load_resident
from fastrank.federated.parallel import make_executor
from fastrank.federated.partition import make_partition

if TYPE_CHECKING:
    import numpy as np

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

    Args:
        config: a ``Config``; or leave it out and give its fields, and the method's, as keywords.
        method: a ``Method`` instance when ``config`` is given (``resolve`` makes the pair; a class
            of your own needs no registration).
        data: a ``TextData`` to use instead of loading ``config.dataset``.
        partition: index arrays per client, or any object with ``num_partitions`` and
            ``load_partition(i)``, instead of ``config.partition``.
        callbacks: told of every stage and round.

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
        dataset = config.dataset if data is None else data.name
        self.config = dataclasses.replace(config, method=method.name, dataset=dataset)
        self.method = method
        self.callbacks = list(callbacks)
        self.data, self._partition = data, partition
        self.output_dir = Path(config.output_dir or rundir.default_name(config.method))
        self.device = find_device(config.device)

    # -- set-up ----------------------------------------------------------------------------------

    def prepare(self) -> ServerState:
        """Load data and model, split, encode, and let the method initialise; nothing is written."""
        from fastrank.data import encode

        config = self.config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if self.data is None:
            self.data = self._load_data()
        self._tell("on_stage", f"loading model: {config.model}")
        self.model = load_resident(
            config.model,
            self.data,
            seed=config.seed,
            device=self.device,
            dtype=getattr(torch, config.dtype),
            max_length=config.max_length,
        )
        tokenizer, task = self.model.tokenizer, self.data.task
        self.train = encode(self.data.train, tokenizer, task, config.max_length)
        self.test = encode(self.data.test, tokenizer, task, config.max_length)
        self.partition = self._split()
        run = Run(config.num_rounds, len(self.partition), config.clients_per_round, config.seed)
        self.method = self.method.in_run(run)
        state = self.method.init(self.model, config.seed)
        options = LocalOptions(
            seed=config.seed,
            batch_size=config.per_device_train_batch_size,
            epochs=config.local_epochs,
            max_steps=config.local_steps,
            group_by_length=config.group_by_length,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_ratio=config.warmup_ratio,
            base_dropout=config.base_dropout,
        )
        self.executor = make_executor(
            config.executor,
            config.clients_in_parallel,
            self.model,
            self.train,
            self.partition,
            options,
        )
        return state

    def _load_data(self) -> TextData:
        from fastrank.data import load_data

        config = self.config
        self._tell("on_stage", f"loading data: {config.dataset}")
        return load_data(
            config.dataset,
            task=config.task,
            text_column=config.text_column,
            label_column=config.label_column,
            prompt_column=config.prompt_column,
            response_column=config.response_column,
            messages_column=config.messages_column,
            group_column=config.group_column,
            test_dataset=config.test_dataset,
            test_fraction=config.test_fraction,
            split=config.split,
            max_examples=config.max_examples,
            seed=config.seed,
            progress=lambda *progress: self._tell("on_progress", *progress),
        )

    def _split(self) -> list[np.ndarray]:
        """Positions of each client's examples in the encoded training set."""
        from fastrank.data import select

        # a dialogue that lost its whole response to max_length is not there to be trained on
        train = select(self.data.train, self.train.kept)
        chosen = self._partition
        if chosen is None:
            default = "iid" if train.labels is None else "dirichlet"
            self.config = dataclasses.replace(
                self.config, partition=self.config.partition or default
            )
            chosen = self.config.partition
        config = self.config
        partition = make_partition(
            chosen,
            labels=train.labels,
            groups=train.groups,
            num_examples=len(train.examples),
            num_clients=config.num_clients,
            seed=config.seed,
            alpha=config.alpha,
            min_partition_size=config.min_partition_size,
            dialect=config.dialect,
            balance=config.balance,
            classes_per_client=config.classes_per_client,
            class_assignment_mode=config.class_assignment_mode,
            shards_per_client=config.shards_per_client,
            shard_size=config.shard_size,
            keep_incomplete_shard=config.keep_incomplete_shard,
        )
        if len(partition) < config.clients_per_round:
            raise UsageError(
                f"clients_per_round is {config.clients_per_round} but the partition gives "
                f"{len(partition)} clients; lower clients_per_round"
            )
        return partition

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the run's bits, as config.json holds it (after ``prepare``)."""
        return rundir.describe(self)

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run from the start; the output folder must be new or empty."""
        try:
            rundir.refuse_occupied(self.output_dir)
            state = self.prepare()
            rundir.create(self.output_dir, self.resolved())
            start = self._evaluate(state, None)
            facts = {"initial_accuracy": start["accuracy"], "initial_loss": start["loss"]}
            return self._go(Checkpoint(0, state, {}, [], facts))
        finally:
            self._tell("close")

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        *,
        method: type[Method] | None = None,
        data: TextData | None = None,
        partition: Any = None,
        callbacks: Iterable[Callback] = (),
    ) -> RunResult:
        """Go on after the last whole checkpoint of a run.

        Args:
            method: the class of a method that fastrank doesn't know by name.
            data, partition: the objects the run was started with, if it was.

        Raises:
            UsageError: no run there, a finished one, or data and versions that would change it.
        """
        saved = rundir.read(Path(run_dir))
        options = {**saved["options"], "output_dir": str(run_dir)}
        self = cls(
            *resolve(options, method=method), data=data, partition=partition, callbacks=callbacks
        )
        try:
            state = self.prepare()
            rundir.check_same(saved, self.resolved(), self.output_dir)
            checkpoint = load_latest(self.output_dir)
            if checkpoint is None:  # killed before the first round was over
                start = self._evaluate(state, None)
                facts = {"initial_accuracy": start["accuracy"], "initial_loss": start["loss"]}
                checkpoint = Checkpoint(0, state, {}, [], facts)
            return self._go(checkpoint)
        finally:
            self._tell("close")

    def _go(self, checkpoint: Checkpoint) -> RunResult:
        config, method = self.config, self.method
        state, clients = checkpoint.state, dict(checkpoint.client_states)
        ledger, meter = Ledger(checkpoint.rows), Meter(self.device)
        facts = dict(checkpoint.facts)
        self.executor.restore(facts)
        self._tell("on_start", self, checkpoint.rounds_done)
        for t in range(checkpoint.rounds_done, config.num_rounds):
            began = time.perf_counter()
            meter.start()
            cohort = sample_cohort(len(self.partition), config.clients_per_round, config.seed, t)
            self._tell("on_round_start", t + 1, cohort)
            state, noted = self._switched(state, t)
            method.arrange(self.model, state, t)
            exchange = Exchange(
                method, state, t, clients, config.charge_initial, config.drop_nonfinite
            )
            seen: list[tuple[float, int]] = []  # (train loss, examples) of each valid update
            updates = watched(
                self.executor.run(exchange, cohort, lambda c: self._tell("on_client", c)), seen
            )
            first = next(updates, None)
            if first is not None:  # else every client was dropped and the state stays
                state, metrics = method.aggregate(state, itertools.chain([first], updates), t)
                noted |= metrics
            if noted:
                recorded = [*facts.get("metrics", []), {"round": t + 1, **noted}]
                facts["metrics"] = recorded
            last = t + 1 == config.num_rounds
            score = {"loss": None, "accuracy": None}
            if last or (t + 1) % config.eval_every == 0:
                limit = None if last else config.max_eval_examples
                score = self._evaluate(state, limit, clients)
            traffic = dataclasses.asdict(exchange.traffic)
            row = ledger.add(
                round=t + 1,
                train_loss=weighted_average(seen),
                eval_loss=score["loss"],
                accuracy=score["accuracy"],
                clients=len(cohort),
                dropped=len(exchange.dropped),
                trainable_params=method.trainable_params(state),
                seconds=round(time.perf_counter() - began, 3),
                peak_memory=meter.peak_memory(),
                energy_j=meter.energy_j(),
                **traffic,
            )
            facts |= self.executor.facts()
            checkpoint = Checkpoint(t + 1, state, clients, ledger.rows, facts)
            if last or (t + 1) % config.checkpoint_every == 0:
                save_checkpoint(self.output_dir, checkpoint, config.keep_checkpoints)
                ledger.write(self.output_dir / "rounds.csv")
                rundir.write_metrics(self.output_dir, facts)
            self._tell("on_round_end", row)
        return self._finish(checkpoint)

    def _finish(self, checkpoint: Checkpoint) -> RunResult:
        state = checkpoint.state
        without = None
        zeroed = self.method.without_adapters(state)
        if zeroed is not None:
            self._tell("on_stage", "evaluating with the adapters zeroed")
            without = self._evaluate(dataclasses.replace(state, tensors=zeroed), None)["accuracy"]
        if own := self.method.personal(state, checkpoint.client_states):
            state = dataclasses.replace(state, tensors=mean_of(own))
        self.method.finish(self.model, state)
        summary = rundir.finish(self, checkpoint, without)
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
            return evaluate_in_turn(self.model, own, self.test, size, limit)
        return evaluate(self.model, self.test, size, limit)

    def _tell(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*args)


def watched(updates: Iterable[Update], seen: list[tuple[float, int]]) -> Iterator[Update]:
    """Pass updates on and note each one's loss and weight."""
    for update in updates:
        seen.append((update.train_loss, update.num_examples))
        yield update


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
