"""Our reading of SLoRA, and sparse fine-tuning: masks, bytes, the switch, what stays of W0."""

import dataclasses
import json

import pytest
import torch
from staged_runs import (
    assert_equal,
    assert_resumes_everywhere,
    assert_side_by_side,
    cohorts,
    gpt2,
    gpt2_logits,
    loaded_accuracy,
    logits,
    prepared,
    run,
    values,
)

from fastrank.errors import UsageError
from fastrank.federated import Callback, Simulation
from fastrank.federated.methods import FedAvg, SLoRA, _sparse, _stages, slora
from fastrank.federated.methods.base import Run
from fastrank.kernels.packing.mask import SparseMask

HIDDEN, INNER, LABELS = 32, 48, 3
P = 2 * (4 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + INNER))
D = 2 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
H = HIDDEN * LABELS + LABELS
BIG = {"learning_rate": 2e-2, "stage2_learning_rate": 5e-3, "density": 0.25}


@pytest.fixture
def sparse(options):
    """Two rounds of stage 1, two of stage 2."""
    return (
        options
        | BIG
        | {"method": "slora", "num_rounds": 4, "stage1": 0.5, "r": 4, "local_steps": 2}
    )


@pytest.fixture
def pristine(options):
    simulation, _ = prepared(options, method="head-only")
    return simulation.model.read(simulation.model.base_names())


def masks_from_names(names, density=0.25):
    """Masks as their definition has them: seed 0, the parameter's name, round 0."""
    shapes = {
        f"bert.encoder.layer.{i}.{path}": shape
        for i in range(2)
        for path, shape in {
            "attention.self.query": (HIDDEN, HIDDEN),
            "attention.self.key": (HIDDEN, HIDDEN),
            "attention.self.value": (HIDDEN, HIDDEN),
            "attention.output.dense": (HIDDEN, HIDDEN),
            "intermediate.dense": (INNER, HIDDEN),
            "output.dense": (HIDDEN, INNER),
        }.items()
    }
    assert set(shapes) <= {name.rpartition(".")[0] for name in names}
    return {f"{n}.weight": SparseMask(s, density, 0, f"{n}.weight") for n, s in shapes.items()}


# -- stage 1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_only_masked_entries_ever_differ_from_w0(sparse, pristine, decay):
    """One mask over clients and rounds, and no decay of what is frozen: two bugs in public code."""
    result = run(sparse, stage1=1.0, num_rounds=3, weight_decay=decay)
    after, masks = values(result), masks_from_names(pristine)
    changed = {name: (after[name] != value).nonzero() for name, value in pristine.items()}
    assert {name for name, at in changed.items() if len(at)} == set(masks)
    for name, mask in masks.items():
        kept = torch.zeros(mask.numel, dtype=torch.bool)
        kept[mask.positions()] = True
        moved = (after[name] != pristine[name]).flatten()
        assert not moved[~kept].any()
        assert moved[kept].float().mean() > 0.95


def test_every_client_of_every_round_has_the_same_mask(sparse):
    seen = []

    class Look(Callback):
        def on_start(self, simulation, done):
            self.model = simulation.model

        def on_client(self, client):
            seen.append(_sparse.masks_of(self.model))

    Simulation(**{**sparse, "stage1": 1.0, "num_rounds": 2}, callbacks=[Look()]).run()
    assert len(seen) == 6
    assert all(masks == seen[0] for masks in seen)
    wanted = masks_from_names([name.replace(".values", ".weight") for name in seen[0]])
    assert list(seen[0].values()) == list(wanted.values())


def test_stage_1_alone_is_sft(sparse, tmp_path):
    a = run(sparse, tmp_path / "a", stage1=1.0)
    plain = {k: v for k, v in sparse.items() if k not in ("r", "stage1", "stage2_learning_rate")}
    b = run({**plain, "method": "sft"}, tmp_path / "b")
    assert_equal(values(a), values(b))
    assert [r["payload_up"] for r in a.rows] == [r["payload_up"] for r in b.rows]


def test_density_1_is_fedavg_of_those_matrices(sparse, tmp_path, pristine):
    @dataclasses.dataclass(frozen=True)
    class OfTargets(FedAvg):
        def init(self, model, seed):
            state = super().init(model, seed)
            wanted = {*masks_from_names(model.base_names()), *state.head}
            tensors = {n: v for n, v in state.tensors.items() if n in wanted}
            return dataclasses.replace(state, tensors=tensors)

    a = run(sparse, tmp_path / "a", stage1=1.0, density=1.0, num_rounds=2, learning_rate=1e-3)
    common = {k: v for k, v in sparse.items() if k not in {*BIG, "stage1", "r", "method"}}
    b = run(common, tmp_path / "b", OfTargets, num_rounds=2, learning_rate=1e-3)
    a, b = values(a), values(b)
    for name in masks_from_names(pristine):
        moved = b[name] - pristine[name]
        assert moved.norm() > 0
        assert (a[name] - b[name]).norm() / moved.norm() < 1e-2
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("law", ["stratified", "bernoulli"])
def test_all_parameters_can_be_masked(sparse, pristine, tmp_path, law):
    from transformers import AutoModelForSequenceClassification

    changed = {"mask_targets": "all", "mask": law, "num_rounds": 2}
    result = run(sparse, tmp_path / "one", stage1=1.0, **changed)
    after = values(result)
    total = 0
    for name, value in pristine.items():
        mask = SparseMask(tuple(value.shape), 0.25, 0, name, 0, law)
        moved = (after[name] != value).flatten().nonzero()[:, 0]
        assert set(moved.tolist()) <= set(mask.positions().tolist())
        total += mask.nnz
    assert (after["bert.embeddings.LayerNorm.bias"] != 0).any()
    assert result.rows[0]["payload_up"] == 3 * 4 * (total + H)
    loaded = AutoModelForSequenceClassification.from_pretrained(result.output_dir / "model")
    assert_equal(after, dict(loaded.named_parameters()))
    # the second stage starts from W0 again, and only the matrices have adapters
    two = run(sparse, tmp_path / "two", **changed)
    assert two.rows[1]["payload_up"] == 3 * 4 * (4 * P + H)
    names = _stages.wrapped_base(two.model, pristine)
    assert_equal(pristine, {n: values(two)[w] for n, w in names.items()})


# -- the switch -----------------------------------------------------------------------------------


def switched(options, **changed):
    """State before and after the switch, from values drawn at random; one matrix's are zero."""
    simulation, state = prepared(options, **changed)
    torch.manual_seed(3)
    drawn = {n: torch.randn_like(v) if n not in state.head else v for n, v in state.tensors.items()}
    zero = "bert.encoder.layer.1.output.dense.values"
    drawn[zero] = torch.zeros_like(drawn[zero])
    state = dataclasses.replace(state, tensors=drawn)
    simulation.method.show(simulation.model, state)
    masks, before = _sparse.masks_of(simulation.model), logits(simulation)
    after, metrics = simulation.method.switch(simulation.model, state, 2)
    return simulation, state, masks, before, after, metrics


@pytest.mark.parametrize("split", ["B", "balanced"])
def test_the_factors_are_the_best_of_their_rank(sparse, split):
    simulation, state, masks, _, after, metrics = switched(sparse, svd_split=split)
    seeded, _ = prepared(sparse, stage1=0.0)
    energies = metrics["switch_energy_by_module"]
    assert metrics["switch_matrices"] == len(masks) == len(energies) == 12
    for name, mask in masks.items():
        module = name.removesuffix(".values")
        A, B = _stages.factor_names(f"base_model.model.{module}")
        product = simulation.method.scale * after.tensors[B] @ after.tensors[A]
        dense = _sparse.spread(state.tensors[name], mask)
        U, S, Vh = torch.linalg.svd(dense)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(product, best, rtol=0, atol=1e-5 * max(1, float(S[0])))
        if not dense.any():  # a dead direction keeps the seeded A, so that it can train
            assert torch.equal(after.tensors[A], seeded.model.read([A])[A])
            assert not after.tensors[B].any()
            continue
        wanted = float(S[:4].square().sum() / S.square().sum())
        assert energies[module] == pytest.approx(wanted, rel=1e-4)
        norms = after.tensors[A].norm(dim=1)
        if split == "B":
            torch.testing.assert_close(norms, torch.ones(4), rtol=1e-4, atol=0)
        else:
            torch.testing.assert_close(norms, after.tensors[B].norm(dim=0), rtol=1e-4, atol=0)


def test_one_decomposition_of_each_matrix_in_a_run(sparse, monkeypatch):
    asked = []
    real = slora.refactor

    def counted(updates, *rest, **options):
        asked.extend(updates)
        return real(updates, *rest, **options)

    monkeypatch.setattr(slora, "refactor", counted)
    result = run(sparse)
    assert len(asked) == len(set(asked)) == 12
    recorded = [json.loads(x) for x in (result.output_dir / "metrics.jsonl").open()]
    switch = next(entry for entry in recorded if "switch_energy" in entry)
    assert switch["round"] == 3
    # stage 1 is not lost on the way: what the adapters start from is a part of it
    assert all(0.05 < e < 1 for e in switch["switch_energy_by_module"].values())
    assert switch["accuracy_before_switch"] == result.rows[1]["accuracy"]
    assert switch["loss_after_switch"] != switch["loss_before_switch"]


def test_the_head_goes_over_the_switch(sparse):
    _, state, _, _, after, _ = switched(sparse)
    assert len(after.head) == len(state.head) == 2
    for old in state.head:
        new = next(n for n in after.head if n.endswith(old.rpartition(".")[2]))
        assert torch.equal(after.tensors[new], state.tensors[old])


def test_a_matrix_without_its_adapter_raises(sparse):
    """Public code loses the start in silence where names differ by PEFT's base_layer."""
    simulation, *_ = switched(sparse)
    known = [n.removeprefix("base_model.model.") for n in simulation.model.adapted_modules()]
    assert len(_stages.adapters_of(simulation.model, known)) == 12
    for wrong in (known[1:], [*known, "bert.pooler.dense"], [*known[1:], f"{known[0]}.base_layer"]):
        with pytest.raises(RuntimeError, match="has no counterpart"):
            _stages.adapters_of(simulation.model, wrong)
    with pytest.raises(RuntimeError, match="isn't there"):
        _stages.wrapped_base(simulation.model, ["bert.nothing.weight"])


def test_base_is_w0_in_stage_2(sparse, pristine):
    result = run(sparse)
    after = values(result)
    names = _stages.wrapped_base(result.model, pristine)
    assert_equal(pristine, {n: after[w] for n, w in names.items()})
    assert not (result.output_dir / "base").exists()


def test_kept_residual_changes_no_logit_at_the_switch(sparse):
    simulation, _, _, before, after, _ = switched(sparse, keep_residual=True)
    simulation.method.show(simulation.model, after)
    torch.testing.assert_close(logits(simulation), before, rtol=0, atol=1e-4)
    dropped, _, _, before, after, _ = switched(sparse)
    dropped.method.show(dropped.model, after)
    assert (logits(dropped) - before).abs().max() > 1e-2


def test_kept_residual_over_transposed_weights():
    resident = gpt2()
    method = SLoRA(keep_residual=True, density=0.25).in_run(Run(4, 3, 3, 0))
    state = method.init(resident, 0)
    drawn = {n: 0.3 * torch.randn_like(v) for n, v in state.tensors.items()}
    state = dataclasses.replace(state, tensors=drawn)
    method.show(resident, state)
    before = gpt2_logits(resident)
    after, metrics = method.switch(resident, state, 1)
    assert metrics["switch_matrices"] == 4
    method.show(resident, after)
    torch.testing.assert_close(gpt2_logits(resident), before, rtol=0, atol=1e-4)
    zeroed = dataclasses.replace(after, tensors=method.without_adapters(after))
    method.show(resident, zeroed)
    assert (gpt2_logits(resident) - before).abs().max() > 1e-2


# -- the whole run --------------------------------------------------------------------------------


def test_no_stage_1_is_fedit(sparse, tmp_path):
    a = run(sparse, tmp_path / "a", stage1=0.0)
    common = {k: v for k, v in sparse.items() if k not in {*BIG, "stage1"}}
    b = run({**common, "method": "fedit", "learning_rate": 5e-3}, tmp_path / "b")
    assert_equal(values(a), values(b))


@pytest.mark.parametrize(
    ("keep", "dtype", "width"), [(False, "float32", 4), (True, "float32", 4), (True, "bfloat16", 2)]
)
def test_payload_bytes_equal_the_formula(sparse, keep, dtype, width):
    sparse |= {"keep_residual": keep, "wire_dtype": dtype, "num_rounds": 6, "clients_per_round": 2}
    sparse |= {"density": 1 / 64}
    result = run(sparse)
    k, r1 = sum(-(-n // 64) for n in 2 * [*4 * [HIDDEN * HIDDEN], *2 * [HIDDEN * INNER]]), 3
    assert k == D // 64
    stage1, stage2 = width * (k + H), width * (4 * P + H)
    arrived = set()
    for t, (row, cohort) in enumerate(zip(result.rows, cohorts(sparse), strict=True)):
        each = stage1 if t < r1 else stage2
        assert row["payload_up"] == 2 * each
        late = set() if t < r1 else set(cohort) - arrived
        arrived |= late
        wanted = 2 * each + (width * k * len(late) if keep else 0)
        assert row["payload_down"] == (wanted if t else 0)
        assert row["head_up"] == 2 * width * H
    assert 2 < len(arrived) < 6  # some came later than R1, some never
    assert result.rows[-1]["trainable_params"] == 4 * P + H


def test_resumes_at_any_round(sparse, tmp_path):
    changed = {"keep_residual": True, "num_rounds": 3, "stage1": 0.3}  # the switch is in between
    whole = assert_resumes_everywhere(sparse | changed, tmp_path)
    assert (whole.output_dir / "base").exists()


@pytest.mark.parametrize("method", ["slora", "sa-fedlora"])
def test_a_frozen_head_stays_and_is_not_sent(options, method):
    changed = {"method": method, "head": "freeze", "num_rounds": 2, "local_steps": 1}
    simulation, _ = prepared(options | changed)
    first = simulation.model.read(simulation.model.head_names())
    result = run(options | changed)
    assert all(row["head_up"] == row["head_down"] == 0 for row in result.rows)
    names = _stages.wrapped_head(result.model, first)
    assert_equal(first, {n: values(result)[w] for n, w in names.items()})


def test_stage_2_side_by_side(sparse, tmp_path, caplog):
    assert_side_by_side(sparse | {"keep_residual": True, "num_rounds": 3}, tmp_path)
    said = [r.message for r in caplog.records if "one after another" in r.message]
    assert said == ["clients train one after another: slora changes the base itself"]


@pytest.mark.parametrize("keep", [False, True])
def test_result_loads_with_peft_alone(sparse, keep):
    from peft import AutoPeftModelForSequenceClassification

    simulation = Simulation(**{**sparse, "keep_residual": keep, "local_steps": 8})
    result = simulation.run()
    folder = result.output_dir / "adapter"
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder)
    accuracy = loaded_accuracy(model, simulation.data, folder)
    assert accuracy == pytest.approx(result.summary["accuracy"], abs=1e-9)
    assert accuracy > 0.5


def test_result_of_sft_loads_with_transformers(options):
    from transformers import AutoModelForSequenceClassification

    simulation = Simulation(**{**options, "method": "sft", "density": 0.2, "learning_rate": 2e-2})
    result = simulation.run()
    folder = result.output_dir / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    accuracy = loaded_accuracy(model, simulation.data, folder)
    assert accuracy == pytest.approx(result.summary["accuracy"], abs=1e-9)
    assert result.summary["accuracy_without_adapters"] is not None


def test_a_shared_parameter_is_not_masked_behind_its_other_users_back():
    method = SLoRA(mask_targets="all").in_run(Run(4, 3, 3, 0))
    with pytest.raises(UsageError, match=r"wte\.weight, which several layers share"):
        method.init(gpt2(), 0)


def test_defaults_fit_runs_of_any_length():
    for rounds in range(1, 60):
        method = SLoRA().in_run(Run(rounds, 10, 2, 0))
        assert method.switch_round == max(1, round(0.1 * rounds))
        assert [t for t in range(rounds) if method.switches(t)] == [method.switch_round] * (
            rounds > 1
        )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"density": 0.7}, "density of a stratified mask must be at most 1/2, or 1; got 0.7"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5, "mask": "bernoulli"}, r"density of a bernoulli mask must be in \(0, 1\]"),
        ({"mask": "magnitude"}, "mask must be one of stratified, bernoulli"),
        ({"mask_targets": "heads"}, "mask_targets must be one of adapted, all"),
        ({"stage1": 1.1}, r"stage1 is a share of the rounds in \[0, 1\], got 1.1"),
        ({"svd_split": "A"}, "svd_split must be one of B, balanced"),
        ({"stage2_learning_rate": 0.0}, "stage2_learning_rate must be above 0"),
        ({"r": 33}, "r must be from 1 to 32"),
        ({"target_modules": ("query", "classifier")}, "a part of the task head"),
        ({"target_modules": ("nothing",)}, "no linear layer"),
    ],
)
def test_bad_options_are_refused_before_training(sparse, wrong, words):
    with pytest.raises(UsageError, match=words):
        prepared(sparse, **wrong)
