"""The presets under bench/methods: every run of every file is one that `simulate` would start."""

from collections import Counter
from pathlib import Path

import pytest

from fastrank.federated.compare.plan import read_plan
from fastrank.federated.config import resolve
from fastrank.federated.methods import METHODS
from fastrank.federated.methods.base import Run

PRESETS = Path(__file__).parents[2] / "bench" / "methods"

EVERYWHERE = {"fedara", "slora", "sa-fedlora", "fed-plora", "fedavg", "fedit", "head-only"}
AT_TENTH = {
    "fedprox", "sft", "bitfit", "houlsby", "pfeiffer", "ffa-lora", "fedsa-lora", "hetlora",
    "flexlora", "flora", "fedex-lora", "fedsvd", "federa", "adalora",
}  # fmt: skip

RUNS = [planned for path in sorted(PRESETS.rglob("*.toml")) for planned in read_plan(path)]
CONFIGURATIONS = {(p.source, p.name.rpartition("-seed")[0]): p for p in RUNS}


@pytest.mark.parametrize(
    "planned", [pytest.param(planned, id=name) for (_, name), planned in CONFIGURATIONS.items()]
)
def test_every_configuration_resolves(planned):
    """With the checks that depend on the run, in full and --quick."""
    quick = read_plan(planned.source, quick=True)[0].options["num_rounds"]
    for rounds in (planned.options["num_rounds"], quick):
        config, method = resolve({**planned.options, "num_rounds": rounds})
        method.in_run(Run(rounds, config.num_clients, config.clients_per_round, config.seed))


def test_the_common_preset_is_the_grid():
    grid = {}
    for planned in RUNS:
        if planned.source.parent.name == "common":
            o = planned.options
            grid.setdefault(o["method"], set()).add((o["alpha"], o["seed"]))
            assert (o["num_clients"], o["clients_per_round"], o["partition"]) == (
                100, 10, "dirichlet")  # fmt: skip
            assert o["num_rounds"] >= 30
            assert o.get("dataset", "embedded") == o.get("model", "embedded") == "embedded"
    assert set(grid) == EVERYWHERE | AT_TENTH
    for method, cells in grid.items():
        alphas = (0.1, 1, 100) if method in EVERYWHERE else (0.1,)
        assert cells == {(a, s) for a in alphas for s in (0, 1, 2)}, method


def test_the_two_common_files_differ_in_methods_alone():
    by_file = {}
    for planned in RUNS:
        if planned.source.parent.name == "common" and planned.options["alpha"] == 0.1:
            by_file.setdefault(planned.source.name, []).append(planned.options)
    general = [
        {k: v for k, v in runs[0].items() if all(k in other for other in runs)}
        for runs in by_file.values()
    ]
    for options in general:
        options.pop("method")
        options.pop("learning_rate", None)  # every method's own
    assert len(general) == 2
    assert general[0] == general[1]


def test_every_method_has_an_equal_tuning_budget():
    tuned = [p.options for p in RUNS if p.source.name == "rates.toml"]
    assert set(Counter(o["method"] for o in tuned).values()) == {3}
    assert {o["method"] for o in tuned} == EVERYWHERE | AT_TENTH
    used = {p.options["seed"] for p in RUNS if p.source.parent.name == "common"}
    assert not used & {o["seed"] for o in tuned}


# the rate that is tuned, where it isn't learning_rate
TUNED = {"head-only": "head_learning_rate", "slora": "stage2_learning_rate",
         "sa-fedlora": "stage2_learning_rate"}  # fmt: skip


@pytest.mark.parametrize("method", sorted(EVERYWHERE | AT_TENTH))
def test_rates_go_in_steps_of_three(method):
    name = TUNED.get(method, "learning_rate")
    tried = [
        p.options[name]
        for p in RUNS
        if p.source.name == "rates.toml" and p.options["method"] == method
    ]
    assert tried == pytest.approx([tried[0], 3 * tried[0], 9 * tried[0]], rel=0.12)
    presets = [
        p for p in RUNS if p.source.parent.name == "common" and p.options["method"] == method
    ]
    default = getattr(METHODS[method](), name)
    assert {p.options.get(name, default) for p in presets} <= set(tried)


@pytest.mark.parametrize("method", sorted(EVERYWHERE | AT_TENTH))
def test_tuned_methods_have_the_common_presets_options(method):
    """But for the rates, and for stages that ten rounds round otherwise."""
    found = {}
    for planned in RUNS:
        if planned.options["method"] == method and planned.options["seed"] in (0, 100):
            folder = planned.source.parent.name
            if folder in ("common", "tuning"):
                found.setdefault(folder, planned.options)
    free = {"num_rounds", "alpha", "seed", "eval_every", "warmup", "stage1", "rank_max",
            "rank_min", "learning_rate", *TUNED.values()}  # fmt: skip
    common, tuning = (
        {k: v for k, v in found[folder].items() if k not in free} for folder in ("common", "tuning")
    )
    assert common == tuning


def test_partitions_of_the_common_preset_exist():
    """100 clients at Dirichlet 0.1 leave none of them empty, in every seed."""
    import numpy as np

    from fastrank.federated.partition import make_partition

    labels = np.arange(5774) % 20
    for planned in RUNS:
        o = planned.options
        if planned.source.name == "main.toml" and o["method"] == "fedit":
            config, _ = resolve(o)
            parts = make_partition(
                config.partition, labels=labels, groups=None, num_examples=len(labels),
                num_clients=config.num_clients, seed=config.seed, alpha=config.alpha,
                min_partition_size=config.min_partition_size, dialect=config.dialect,
                balance=config.balance, classes_per_client=config.classes_per_client,
                class_assignment_mode=config.class_assignment_mode,
                shards_per_client=config.shards_per_client, shard_size=config.shard_size,
                keep_incomplete_shard=config.keep_incomplete_shard,
            )  # fmt: skip
            assert len(parts) == 100
            assert min(map(len, parts)) >= 1
