"""Runs of two ranks beside the same run of one process, and their comparison."""

import torch
from staged_runs import recorded, rows_of
from two_ranks import simulate

from fastrank.federated.checkpoint import load_latest
from fastrank.federated.export import digest


def into(options, folder, **changed):
    return {**options, "output_dir": str(folder), **changed}


def both(pair, options, tmp_path, injury=None):
    """The same run by two ranks and by one process: their answers and folders."""
    two = pair.run(simulate, into(options, tmp_path / "two"), injury)
    one = simulate(into(options, tmp_path / "one"), injury)
    for answer in (*two, one):
        assert "error" not in answer, answer["error"]
    return two, one, tmp_path / "two", tmp_path / "one"


def assert_same_run(two, one, ours, theirs):
    """Every number that is no measurement, the result, and what the next round would start from."""
    assert two[0]["rows"] == two[1]["rows"] == one["rows"]
    assert rows_of(ours) == rows_of(theirs)
    same = set(one["summary"]) - {"output_dir", "result", "seconds", "peak_memory", "curve"}
    assert two[0]["summary"] == two[1]["summary"]
    for key in same:
        assert two[0]["summary"][key] == one["summary"][key], key
    assert recorded(ours) == recorded(theirs)
    assert_same_result(ours, theirs)


def assert_same_result(ours, theirs):
    kinds = [kind for kind in ("adapter", "base", "model") if (theirs / kind).exists()]
    assert kinds
    for kind in kinds:
        # adapter_config.json names the folder of a changed base
        left, right = (digest(folder / kind) for folder in (ours, theirs))
        left.pop("adapter_config.json", None), right.pop("adapter_config.json", None)
        assert left == right
    mine, other = load_latest(ours), load_latest(theirs)
    for tensors, wanted in (
        (mine.state.tensors, other.state.tensors),
        (mine.state.server, other.state.server),
    ):
        assert list(tensors) == list(wanted)
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert mine.state.extra == other.state.extra
    assert list(mine.client_states) == list(other.client_states)
    for client, kept in other.client_states.items():
        assert list(mine.client_states[client]) == list(kept)
        assert all(torch.equal(mine.client_states[client][n], v) for n, v in kept.items())


def flags(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
