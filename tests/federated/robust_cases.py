"""What the tests of robust rules, clipping and attacks share."""

from lora_cases import Bare, update_of

from fastrank.federated.attacks import Attack
from fastrank.federated.methods import FedARA
from fastrank.federated.methods.base import Run


def updates_of(method, state, clients=range(5), round=0):
    return [update_of(method, state, client, round) for client in clients]


class WithModules(Bare):
    def adapted_modules(self):
        return list(self.shapes)


def fedara():
    method = FedARA(r=4, form="lora", rank_target=2.0).in_run(Run(10, 9, 7, 0))
    return method, method.init(WithModules(), seed=0)


def dense(pair, scale=1.0):
    return scale * (pair.B.double() @ pair.A.double())


def attacked(kind, scale=None, everyone=1.0):
    return Attack(kind, everyone, num_clients=6, seed=3, scale=scale)
