"""The nodes' side: a ClientApp that trains as the simulator does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fastrank.federated.flower.letters import LetterError, letter
from fastrank.federated.flower.node import Node
from fastrank.federated.flower.records import content_of, letter_of
from fastrank.federated.flower.settings import clients_of, options_of
from fastrank.federated.flower.silo import classes_of
from fastrank.federated.methods import Method

if TYPE_CHECKING:
    from fastrank.data import TextData


def client_app(
    options: Mapping[str, Any] | Callable[[Context], Mapping[str, Any]] | None = None,
    *,
    method: type[Method] | None = None,
    data: TextData | str | Path | Callable[[Context], TextData | str | Path] | None = None,
    partition: Any = None,
    state_dir: str | Path | None = None,
) -> ClientApp:
    """A ClientApp for nodes that serve one client or several.

    A process loads data and model once, with its first message, and keeps them. A node's own
    configuration (``flower-supernode --node-config``) says which clients it serves (`clients_of`),
    and may set ``device``, ``state-dir``, and ``dataset``, ``test-dataset`` and ``model`` where
    those lie elsewhere than on the server; their content has to be the same.

    In a run whose ``dataset`` is "silos:CLASS,CLASS" (silo.py), each node has data that no other
    side has. Its configuration's ``dataset`` is then the path of those, or ``data`` has them.

    Args:
        options: of the run, or a function of Flower's context that gives them; by default
            ``context.run_config``, read by `options_of`. They have to be the server's.
        method: the class of a method that fastrank doesn't know by name.
        data: a ``TextData`` or the path of a data set, or a function of Flower's context that gives
            either: the server's data, or a silo's own.
        partition: as for `Simulation`, the same object as on the server.
        state_dir: where clients keep what is theirs between rounds, and nodes what they have
            followed of the base; by default ~/.cache/fastrank/flower. Give every node that shares
            a disk with others of the same partition-id its own.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        place = context.node_config
        given = options(context) if callable(options) else options
        chosen = options_of(context.run_config if given is None else given)
        own = data(context) if callable(data) else data
        if "dataset" in place or isinstance(own, str | Path):
            own = str(place.get("dataset", own))
            if classes_of(chosen.get("dataset", "")) is None:
                chosen["dataset"], own = own, None
        for key in ("device", "test-dataset", "model"):
            if key in place:
                chosen[key.replace("-", "_")] = place[key]
        folder = place.get("state-dir") or state_dir or "~/.cache/fastrank/flower"
        who = str(place.get("clients", place.get("partition-id", "0")))
        node = Node(
            chosen,
            partial(clients_of, place),
            name=re.sub(r"[^0-9]+", "_", who),
            folder=Path(str(folder)).expanduser(),
            method=method,
            data=own,
            partition=partition,
        )
        try:
            reply = node.answer(letter_of(message.content))
        except LetterError as error:
            reply = letter("refused", reason=str(error))
        return Message(content_of(reply), reply_to=message)

    for register in (app.query(), app.train(), app.evaluate()):
        register(answer)
    return app
