"""BitFit: biases and the head, nothing else."""

import pytest
import torch
from side_by_side import Exchange, compare
from staged_runs import assert_equal, assert_resumes_everywhere, prepared, run, values

from fastrank.errors import UsageError
from fastrank.federated.local import LocalOptions
from fastrank.federated.methods.base import LocalPlan

HIDDEN, INNER, LABELS = 32, 48, 3
# embeddings' norm; query, key, value, output and its norm, two linears and a norm; pooler
BIASES = HIDDEN + 2 * (5 * HIDDEN + INNER + HIDDEN + HIDDEN) + HIDDEN
H = HIDDEN * LABELS + LABELS


@pytest.fixture
def small(options):
    return options | {"method": "bitfit", "num_rounds": 2, "local_steps": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_payload_bytes_equal_the_formula(small, dtype, width):
    result = run(small | {"wire_dtype": dtype})
    wanted = 3 * width * (BIASES + H)
    assert [row["payload_up"] for row in result.rows] == [wanted, wanted]
    assert [row["payload_down"] for row in result.rows] == [0, wanted]


def test_only_biases_and_the_head_change(small):
    simulation, state = prepared(small)
    before = simulation.model.read([n for n, _ in simulation.model.model.named_parameters()])
    after = values(run(small))
    trained = {n for n in before if n.endswith(".bias") or n.startswith("classifier.")}
    assert set(state.tensors) == trained
    assert_equal(before, after, set(before) - trained)
    moved = {n for n in trained if not torch.equal(before[n], after[n])}
    # a key's bias shifts all of a row's scores alike, which softmax does not see
    assert {n for n in trained - moved if ".key." not in n} == set()


def test_side_by_side_equals_one_by_one(small):
    simulation, state = prepared(small)
    model = simulation.model
    # the gradient of a key's bias is zero but for rounding: no relative error of its update
    names = tuple(n for n in state.tensors if ".key." not in n)
    model.model.double()
    start = model.read(names)
    plan = LocalPlan(names, dict.fromkeys(names, 1e-2))
    exchange = Exchange(lambda client: start, lambda client: plan)
    compare(model, exchange, LocalOptions(batch_size=3, epochs=2), 1e-6)


def test_resumes_and_loads(small, tmp_path):
    from transformers import AutoModelForSequenceClassification

    whole = assert_resumes_everywhere(small, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(whole.output_dir / "model")
    assert_equal(values(whole), dict(loaded.named_parameters()))


def test_a_model_without_biases_is_refused(small, tiny_llama, instructions):
    changed = {"model": str(tiny_llama), "dataset": str(instructions)}
    with pytest.raises(UsageError, match="LlamaForCausalLM has none"):
        prepared(small | changed)
