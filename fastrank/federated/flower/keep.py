"""What a node keeps between messages, on disk: its processes come and go, some with each message.

    FOLDER/RUN/node_ID/replica          what of the server's state does not follow from the seed
    FOLDER/RUN/client_ID/round_NNNN     what a client kept after that round

Files are messages of `wire`, checked by their own checksum. A client's are kept by round, because a
server that goes on after a checkpoint goes back to that checkpoint's round, with another run of
Flower's: its Context would be lost with the first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastrank.federated.storage import write_atomic
from fastrank.federated.wire import Payload, WireError, from_bytes, to_bytes

_log = logging.getLogger("fastrank")


class Keep:
    """One run's folder on one node."""

    def __init__(self, folder: Path, run: str, node: str) -> None:
        self.run = folder / run
        self._replica = self.run / f"node_{node}" / "replica"

    def replica(self) -> tuple[int, dict[str, Tensor]]:
        """The round before which the kept tensors were the server's, and those; (0, {}) if none."""
        payload = _read(self._replica)
        return (0, {}) if payload is None else (int(payload.metadata["round"]), payload.tensors)

    def keep_replica(self, round: int, tensors: Mapping[str, Tensor]) -> None:
        _write(self._replica, tensors, round)

    def client(self, client: int, round: int | None) -> dict[str, Tensor] | None:
        """What the client kept after that round (None: it has kept nothing yet).

        Raises:
            LookupError: it is not there, or damaged.
        """
        if round is None:
            return None
        payload = _read(self._of(client) / f"round_{round:04d}")
        if payload is None:
            there = [_round(path) + 1 for path in self._rounds(client)]
            raise LookupError(
                f"what client {client} kept after round {round + 1} is not in "
                f"{self._of(client)} (rounds there: {there}); a client's state stays on its node: "
                "start that node with its former state-dir"
            )
        return payload.tensors

    def keep_client(
        self, client: int, round: int, tensors: Mapping[str, Tensor], floor: int
    ) -> None:
        """Keep it, and drop what no checkpoint from ``floor`` rounds on can ask for."""
        _write(self._of(client) / f"round_{round:04d}", tensors, round)
        before = [path for path in self._rounds(client) if _round(path) < min(floor, round)]
        for path in before[:-1]:  # a server at ``floor`` may ask for the newest of these
            path.unlink(missing_ok=True)

    def _of(self, client: int) -> Path:
        return self.run / f"client_{client}"

    def _rounds(self, client: int) -> list[Path]:
        return sorted(self._of(client).glob("round_[0-9]*"), key=_round)


def _round(path: Path) -> int:
    return int(path.name.removeprefix("round_"))


def _write(path: Path, tensors: Mapping[str, Tensor], round: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_bytes(Payload(dict(tensors), {"round": round})))


def _read(path: Path) -> Payload | None:
    try:
        return from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except WireError as error:
        _log.warning("%s is damaged (%s) and is left aside", path, error)
        return None
