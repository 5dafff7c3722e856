"""Two processes that run simulations together, as torchrun would have started them.

They are forked from a server that has imported everything once, so that a pair costs little.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import time
import traceback

import torch
from staged_runs import MEASURED, StopAfter


def hurt(name, nan=(), raises=(), kill=(), stall=()):
    """A method by name, some of whose clients send NaN or raise, or that harms the second rank.

    Args:
        nan, raises: (round from 0, client).
        kill, stall: rounds from 0 in which that rank dies, or sleeps as each of its clients ends.
    """
    from fastrank.federated.methods import METHODS

    class Hurt(METHODS[name]):
        def uplink(self, result):
            at = result.round, result.client
            if at in raises:
                raise ArithmeticError("its disk is full of bees")
            if result.round in kill and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            if result.round in stall and os.environ["RANK"] == "1":
                time.sleep(15)
            if at in nan:
                for value in result.tensors.values():
                    value.fill_(float("nan"))
            return super().uplink(result)

    return Hurt


def simulate(options, injury=None, stop=None, resume=False):
    """One simulation in this process: what it came to, or the error it ended with, plain data."""
    from fastrank.federated import Simulation
    from fastrank.federated.config import resolve

    torch.set_num_threads(1)
    callbacks = [] if stop is None else [StopAfter(stop)]
    method = None if injury is None else hurt(options["method"], **injury)
    said = io.StringIO()
    try:
        with listening(said):
            if resume:
                result = Simulation.resume(
                    options["output_dir"], method=method, callbacks=callbacks
                )
            else:
                config, made = resolve(options, method=method)
                result = Simulation(config, made, callbacks=callbacks).run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "said": said.getvalue()}
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in result.rows]
    return {"rows": rows, "summary": result.summary, "said": said.getvalue(),
            "folder": str(result.output_dir)}  # fmt: skip


def meet(fails):
    """Nested work that fails here or doesn't, and a meeting after it: does it hear the others?"""
    from fastrank.errors import UsageError
    from fastrank.federated.world import join

    world, text = join(), None
    try:
        with world.together(), world.together():
            if fails:
                raise UsageError("not here")
            world.exchange("work", {})
    except UsageError as error:
        text = str(error)
    return text, [said.word["rank"] for said in world.exchange("after it", {"rank": world.rank})]


def diverge(value):
    """The end of a round after which ranks have other states."""
    from fastrank.federated.methods.base import ServerState
    from fastrank.federated.world import RankError, join

    before = ServerState({"w": torch.zeros(3), "same": torch.ones(2)})
    after = ServerState({**before.tensors, "w": torch.tensor([1.0, 2.0, value])})
    try:
        return join().close_round(before, after, 10 * (1 + join().rank), 0.5)
    except RankError as error:
        return str(error)


@contextlib.contextmanager
def listening(file):
    """Our own log, as the command line prints it."""
    import logging

    logger, handler = logging.getLogger("fastrank"), logging.StreamHandler(file)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def command(words, injury=None, errors=None):
    """The command line in this process; its exit status. What it prints goes to the file."""
    from fastrank import cli
    from fastrank.federated import config

    torch.set_num_threads(1)
    if injury is not None:
        plain = config.find_method
        config.find_method = lambda name: hurt(plain(name).name, **injury)
    # as a process of its own, at the level of descriptors
    file = os.open(f"{errors}.{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = cli.main(words)
    os._exit(status)


class Pair:
    """Two ranks that do what they are told, as often as they are told."""

    def __init__(self, size=2):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fastrank.federated.simulation", "transformers", "peft"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def begin(self, function, *arguments, each=None):
        """Start a function on both; ``each`` are one more argument for one rank each."""
        for rank, pipe in enumerate(self.pipes):
            own = () if each is None else (each[rank],)
            pipe.send((function, (*own, *arguments)))

    def results(self, timeout=240):
        """Both ranks' answers; None for one that died."""
        found = []
        for pipe in self.pipes:
            assert pipe.poll(timeout), "a rank gives no answer"
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(None)
        return found

    def run(self, function, *arguments, each=None):
        self.begin(function, *arguments, each=each)
        return self.results()

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def serve(rank, size, port, pipe):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send(function(*arguments))
        except Exception:
            pipe.send({"error": traceback.format_exc()})
