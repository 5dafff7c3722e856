"""Small models, examples and exchanges to compare clients one by one with clients side by side."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastrank.data import Encoded
from fastrank.federated import exchange
from fastrank.federated.executors import Sequential
from fastrank.federated.methods.base import LocalPlan
from fastrank.federated.model import ResidentModel
from fastrank.federated.parallel import ClientParallel

F32, F64 = torch.float32, torch.float64
SIZES = (9, 4, 13, 6, 2)  # examples of each client: unequal steps and last batches
TOTAL = sum(SIZES)


def make_model(kind="bert", dtype=F64, seed=0, **lora) -> ResidentModel:
    import transformers as t

    shared = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_labels": 3}
    shared |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
    torch.manual_seed(seed)
    if kind == "llama":
        config = t.LlamaConfig(**shared, pad_token_id=0, num_key_value_heads=1)
        model, task, head = t.LlamaForCausalLM(config), "causal-lm", ()
    elif kind == "roberta":  # a head of two layers
        config = t.RobertaConfig(**shared, pad_token_id=1)
        model, task, head = t.RobertaForSequenceClassification(config), "seq-cls", ("classifier",)
    else:
        config = t.BertConfig(**shared)
        model, task, head = t.BertForSequenceClassification(config), "seq-cls", ("classifier",)
    tokenizer = SimpleNamespace(pad_token_id=1 if kind == "roberta" else 0)
    resident = ResidentModel(model.to(dtype), tokenizer, task, head, torch.device("cpu"))
    resident.add_lora(**({"r": 4, "lora_alpha": 8.0} | lora))
    return resident


def make_examples(task="seq-cls", count=TOTAL, seed=0, longest=14) -> Encoded:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, size=count)
    ids = [rng.integers(2, 50, size=n).astype(np.int32) for n in lengths]
    if task == "seq-cls":
        labels = rng.integers(0, 3, size=count)
    else:
        labels = [np.where(np.arange(len(i)) < 2, -100, i).astype(np.int64) for i in ids]
    return Encoded(ids, labels, lengths.astype(np.int64), np.arange(count))


def partition(sizes=SIZES) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


class Exchange:
    """A method of equal clients without a wire: results keep their dtype."""

    def __init__(self, start, plans, shares=True):
        self.start, self.plans = start, plans
        self.round, self.state, self.client_states = 2, None, {}
        self.method = SimpleNamespace(
            name="test", shares_base=lambda t: shares, local=lambda s, c, client, t: plans(client)
        )
        self.skipped, self.results = {}, {}

    def send(self, client):
        return self.start(client)

    def receive(self, result):
        self.results[result.client] = result
        return result

    def skip(self, client, reason):
        self.skipped[client] = reason

    on_client_error = "raise"

    def lost(self, client):
        return False

    def plan(self, client):
        own = self.client_states.get(client)
        return self.method.local(self.state, own, client, self.round)

    attempt = exchange.Exchange.attempt


def lora_exchange(model, *, ranks=None, scales=None, names=None, pace=1.0) -> Exchange:
    """Clients that start from the model's adapters, cut to ranks of their own."""
    names = tuple(names or [*model.lora_names(), *model.head_names()])
    generator = torch.Generator().manual_seed(3)
    factors = model.read(n for n in model.lora_names() if ".lora_B." in n)
    for name, value in factors.items():  # of zero, A would have no gradient
        drawn = torch.randn(value.shape, generator=generator, dtype=F64)
        factors[name] = (0.1 * drawn).to(value.dtype)
    model.load(factors)
    values = model.read(names)
    rates = {name: pace * (1e-2 if "lora" in name else 2e-2) for name in names}

    def start(client):
        if ranks is None:
            return values
        r = ranks[client]
        cut = {n: v[:r] for n, v in values.items() if ".lora_A." in n}
        cut |= {n: v[:, :r] for n, v in values.items() if ".lora_B." in n}
        return values | cut

    def plan(client):
        return LocalPlan(names, rates, scale=None if scales is None else scales[client])

    return Exchange(start, plan)


def compare(model, exchange, options, tolerance, sizes=SIZES, together=3, examples=None, **asked):
    """Both executors over all clients; the relative difference of each tensor's update."""
    examples = make_examples(model.task, sum(sizes)) if examples is None else examples
    parts, cohort = partition(sizes), list(range(len(sizes)))
    list(Sequential(model, examples, parts, options).run(exchange, cohort))
    alone, exchange.results = exchange.results, {}
    executor = ClientParallel(model, examples, parts, options, together)
    executor.sequential.run = None  # falling back would compare it with itself
    executor.sequential.train = None
    done = [update.client for update in executor.run(exchange, cohort)]
    assert done == [c for c in cohort if sizes[c]]
    worst = (0.0, "", -1)
    for client, result in alone.items():
        ours = exchange.results[client]
        assert ours.num_steps == result.num_steps
        assert ours.train_loss == pytest.approx(result.train_loss, rel=1e-5)
        start = exchange.start(client)
        for name, value in result.tensors.items():
            moved = value - start[name]
            if not moved.norm() > 0:
                continue
            off = float((ours.tensors[name] - value).norm() / moved.norm())
            worst = max(worst, (off, name, client))
    assert 0 < worst[0] <= tolerance, worst
    return exchange.results
