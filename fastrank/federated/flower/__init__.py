"""fastrank's methods in a real federation, on Flower (extra ``[flower]``).

    # client_app.py
    app = fastrank.federated.flower.client_app()

    # server_app.py
    app = flwr.serverapp.ServerApp()

    @app.main()
    def main(grid, context):
        fastrank.federated.flower.Strategy(context.run_config).start(grid)

The server's loop is `Simulation`'s own: state, cohorts, validation, ledger, checkpoints and run
directory are the simulator's, and only local training happens elsewhere. Both sides are pure
functions of (seed, round, client), so the result has the bits of

    fastrank simulate --executor sequential ...

with the same options on like machines, whichever node serves which client.

What crosses the network: a letter to each node that serves clients of the round, with the method's
payloads exactly as the ledger counts them, and a sketch of the server's state, by which a node
checks what it knows of it. Data may lie on its nodes alone (silo.py). Files, from the server's end
to the node's:

    strategy     Flower's Strategy on the server: starts the run, carries letters over the Grid
    remote       `Simulation` with clients elsewhere: an executor that writes and reads letters
    roster       which node serves which clients; a node that differs is refused
    agreement    what both sides must have in common, and how they differ
    settings     options out of Flower's run configuration, clients out of a node's
    letters      what is written: a JSON header of checked types, and byte strings
    records      letters as Flower's records
    replica      the server's state put together on a node, without being sent
    silo         runs in which every node has data of its own
    node         answers letters: trains and judges clients with the simulator's own executor
    keep         what a node keeps on disk between messages
    client       Flower's ClientApp around a node

Only strategy, client and records import Flower; everything else runs and is tested without it.
"""

from typing import Any

from fastrank._lazy import lazy

_LAZY = {
    "Strategy": "fastrank.federated.flower.strategy",
    "client_app": "fastrank.federated.flower.client",
    "options_of": "fastrank.federated.flower.settings",
}

__all__ = sorted(_LAZY)
_load, __dir__ = lazy(globals(), _LAZY)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "flwr":
            raise
        raise ImportError(
            f"fastrank.federated.flower.{name} needs Flower: pip install 'fastrank[flower]'"
        ) from error
