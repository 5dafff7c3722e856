"""Updates that are no good: dropped, named and without harm; a client's failure says where."""

import dataclasses

import pytest
import torch

from fastrank.federated import Simulation
from fastrank.federated.methods import FedIT


@dataclasses.dataclass(frozen=True)
class Hostile(FedIT):
    """Client 0 sends what ``attack`` makes of its update."""

    attack: str = "nan"
    everyone: bool = False

    def uplink(self, result):
        payload, kept = super().uplink(result)
        if result.client == 0 or self.everyone:
            name = next(iter(payload.tensors))
            value = payload.tensors[name].clone()
            if self.attack == "nan":
                value[0, 0] = float("nan")
            elif self.attack == "inf":
                value[0, 0] = float("inf")
            else:
                value = value[:, :-1]
            payload.tensors[name] = value
        return payload, kept


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("nan", "NaN or Inf"),
        ("inf", "NaN or Inf"),
        ("shape", "[8, 31]; expected torch.float32 [8, 32]"),
    ],
)
def test_bad_update_is_dropped_named_and_does_no_harm(options, attack, words, caplog):
    from fastrank.federated.config import resolve

    options |= {"num_clients": 3, "clients_per_round": 3, "num_rounds": 2}
    config, _ = resolve(options)
    result = Simulation(config, Hostile(attack=attack)).run()
    assert [row["dropped"] for row in result.rows] == [1, 1]
    assert "round 1: client 0 dropped" in caplog.text
    assert words in caplog.text
    assert all(
        torch.isfinite(v).all() for v in result.model.read(result.model.lora_names()).values()
    )


def test_all_updates_dropped_keeps_the_state(options, caplog):
    from fastrank.federated.config import resolve

    config, _ = resolve({**options, "num_rounds": 1})
    result = Simulation(config, Hostile(everyone=True)).run()
    assert result.rows[0]["dropped"] == 3
    assert result.rows[0]["train_loss"] is None
    assert result.summary["accuracy"] == result.summary["initial_accuracy"]


def test_client_failure_names_client_and_round(options):
    class Breaks(FedIT):
        def uplink(self, result):
            raise ZeroDivisionError("no")

    from fastrank.federated.config import resolve

    config, _ = resolve(options)
    with pytest.raises(RuntimeError, match=r"client \d failed in round 1: ZeroDivisionError"):
        Simulation(config, Breaks()).run()
