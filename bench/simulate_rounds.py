"""What `fastrank bench simulate` compares: a round of local training, by three engines.

- "peft-sequential": a stock PEFT model that fastrank never touches, as its users train one: the
  model's own loss, torch.optim.AdamW(fused=True), clip_grad_norm_, one client after another. Its
  batches are tensors on the device before anything is timed.
- "fastrank": the simulator's executor, the one that "auto" chooses; it pads and moves its batches
  itself, in the timed round.
- "fastrank-sequential": the simulator's own one-by-one executor, whatever "auto" chooses.

Every engine writes a client's start values, makes it a fresh optimizer, trains, and copies its
values to the host, once a round: a round's time holds that, spread over its local steps. Nothing is
serialised. Each engine has one model in memory and takes the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.bench.accuracy import largest
from fastrank.bench.harness import WrongResult
from fastrank.bench.simulate_cases import Job, bytes_of
from fastrank.federated.exchange import Exchange
from fastrank.federated.executors import Sequential
from fastrank.federated.local import client_batches
from fastrank.federated.methods.base import LocalResult, ServerState
from fastrank.federated.model import ResidentModel
from fastrank.federated.parallel import ClientParallel, make_executor

# of a client's update, by Frobenius norm; rounding makes some 1e-5
TOLERANCE = 1e-3
# a 16-bit base: rounding decides the sign of small gradients, and AdamW steps by the sign
_TIMES_BASELINE = 1.5
# the round that is run; it seeds the order of batches
ROUND = 1

# client -> parameter name -> its value after the round, on the CPU
Values = dict[int, dict[str, Tensor]]
Round = Callable[[], Values]


class PeftSequential:
    """One stock PEFT model, client after client.

    Args:
        job: base, data and options.
        base: the transformers model to adapt; None: the job's.
        clients: whose batches to hold; None: all.
    """

    def __init__(
        self, job: Job, base: nn.Module | None = None, clients: Iterable[int] | None = None
    ) -> None:
        from peft import get_peft_model

        from fastrank.federated.quiet import quiet

        self.job, self.options = job, job.options()
        with quiet():
            model = get_peft_model(job.base() if base is None else base, job.lora_config())
        self.model = model.to(job.device).train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        clients = job.clients if clients is None else clients
        self.batches = {client: list(_batches(job, client)) for client in clients}

    def run(self, start: Mapping[str, Tensor], steps: int | None = None) -> Values:
        """Every client's values after so many steps (None: the case's)."""
        return {client: self.train(client, start, steps) for client in self.batches}

    def train(
        self, client: int, start: Mapping[str, Tensor], steps: int | None = None
    ) -> dict[str, Tensor]:
        """One client's values, from those it is sent."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(start[name])
        parameters = list(self.trained.values())
        optimizer = torch.optim.AdamW(
            parameters, lr=self.job.case.rate, weight_decay=self.options.weight_decay, fused=True
        )
        for batch in self.batches[client][:steps]:
            self.model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: p.detach().to("cpu", copy=True) for name, p in self.trained.items()}


def _batches(job: Job, client: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each of a client's steps: what the simulator's executors take."""
    from fastrank.data import collate

    indices = job.partition[client]
    for step in client_batches(job.examples, indices, client, ROUND, job.options()):
        batch = collate(job.examples, indices[step], 0)
        yield {name: value.to(job.device) for name, value in batch.items()}


class _Direct(Exchange):
    """An exchange without a wire: values and results pass as they are, and errors stay errors."""

    def __init__(self, job: Job, state: ServerState) -> None:
        super().__init__(job.method, state, ROUND, {}, on_client_error="raise")

    def send(self, client: int) -> Mapping[str, Tensor]:
        return self.state.tensors

    def receive(self, result: LocalResult) -> LocalResult:
        return result

    def skip(self, client: int, reason: str) -> None:
        raise RuntimeError(f"client {client} sat out: {reason}")


class _NoFallback:
    """In place of what clients that can't share a pass go to: it would be measured for them."""

    def train(self, *arguments: Any) -> Any:
        raise RuntimeError("clients trained one after another; the warning above says why")

    run = train


class Contest:
    """Both sides of a case, from the same start.

    Attributes:
        job: the case's data and options.
        resident: fastrank's model.
        state: holds the values that every client starts from.
        peft: the stock model.

    Raises:
        RuntimeError: they train different parameters.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.resident: ResidentModel
        self.resident, self.state = job.resident()
        self.peft = PeftSequential(job)
        if odd := sorted(self.peft.trained.keys() ^ self.state.tensors.keys()):
            raise RuntimeError(f"PEFT and fastrank train other parameters: {', '.join(odd)}")

    def executor(
        self, name: str, together: int | str = "auto", steps: int | None = None
    ) -> Sequential | ClientParallel:
        """What the simulator makes of `executor` and `clients_in_parallel`.

        Args:
            name: "auto", "client-parallel" or "sequential".
            together: clients in parallel, or "auto".
            steps: of each client; None for the case's.
        """
        job, options = self.job, self.job.options(steps)
        return make_executor(name, together, self.resident, job.examples, job.partition, options)

    def by(self, executor: Sequential | ClientParallel) -> Round:
        """A round by an executor; clients that don't share a pass as they should raise."""
        if isinstance(executor, ClientParallel):
            executor.sequential = _NoFallback()
        exchange = _Direct(self.job, self.state)
        clients = self.job.clients
        return lambda: {r.client: r.tensors for r in executor.run(exchange, clients)}

    def by_peft(self, steps: int | None = None) -> Round:
        """A round by the stock model."""
        return lambda: self.peft.run(self.state.tensors, steps)

    def held(self) -> list[Tensor]:
        """What the models hold before a round."""
        models = (self.resident.model, self.peft.model)
        return [t for m in models for t in (*m.parameters(), *m.buffers())]

    def base_bytes(self) -> int:
        """Bytes of fastrank's one model but for its adapters and head."""
        model = self.resident.model
        named = [*model.named_parameters(), *model.named_buffers()]
        return bytes_of(t for name, t in named if name not in self.state.tensors)


def executor_name(executor: Sequential | ClientParallel) -> str:
    """As the option `executor` names it."""
    return "sequential" if isinstance(executor, Sequential) else "client-parallel"


class Judge:
    """Compares the updates of a round of few steps with PEFT's, and both with float64's.

    Args:
        contest: its stock model is in float64 for a round, and its own again after it.

    Attributes:
        steps: of each client in the round that is compared.
    """

    def __init__(self, contest: Contest) -> None:
        self.case, self.start = contest.job.case, contest.state.tensors
        self.steps = min(3, self.case.local_steps)
        by_peft = contest.by_peft(self.steps)
        with in_float64(contest.peft.model):
            self.exact = by_peft()
        self.peft = by_peft()
        self.baseline_error = self.distance(self.peft, self.exact)

    def check(self, found: Values) -> float:
        """The distance of a variant's values from float64's.

        Raises:
            WrongResult: they are not the baseline's.
        """
        error = self.distance(found, self.exact)
        if self.case.dtype == "float32":
            apart = self.distance(found, self.peft)
            if not apart <= TOLERANCE:
                raise WrongResult(f"updates are {apart:.3g} off PEFT's, allowed is {TOLERANCE:g}")
        elif not error <= _TIMES_BASELINE * self.baseline_error:
            raise WrongResult(
                f"updates are {error:.3g} off float64's, PEFT's {self.baseline_error:.3g}"
            )
        return error

    def distance(self, found: Values, wanted: Values) -> float:
        """The largest relative Frobenius distance of a client's update, all its tensors together.

        AdamW moves every element by about its rate, so one tensor gone wrong shows however small.
        Left out are tensors whose gradient is rounding alone (as a key projection's bias has it):
        in float64 they hardly move, elsewhere AdamW makes whole steps of the noise.
        """
        errors = []
        for client, tensors in wanted.items():
            gap = size = 0.0
            for name, value in tensors.items():
                before = self.start[name].double()
                exact = self.exact[client][name] - before
                if exact.square().mean().sqrt() < 1e-4 * self.case.rate:
                    continue
                gap += float((found[client][name].double() - value.double()).square().sum())
                size += float((value.double() - before).square().sum())
            if not size > 0:
                raise WrongResult(f"client {client} has not moved")
            errors.append((gap / size) ** 0.5)
        return largest(errors)


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """The model's own values in float64; back in their dtypes, bit for bit, afterwards.

    Trained values are the caller's to set again.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [t.dtype for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(dtype)
