"""Options from four sources, and what is said to a value that can't work."""

import pytest

from fastrank.errors import UsageError
from fastrank.federated.config import read_assignment, read_toml, resolve


def test_later_sources_win_and_method_options_are_sorted_out(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'method = "fedit"\nnum_rounds = 7\n[lora]\nr = 4\nlora-alpha = 32\n'
        'target_modules = ["query", "value"]\n'
    )
    config, method = resolve(read_toml(path), {"num_rounds": "9"}, dict([read_assignment("r=2")]))
    assert config.num_rounds == 9
    assert (method.r, method.lora_alpha) == (2, 32.0)
    assert method.target_modules == ("query", "value")
    assert method.learning_rate == 2e-3  # the method's own default


def test_list_from_a_flag():
    assert resolve({"target_modules": "query,value"})[1].target_modules == ("query", "value")
    assert resolve({"target_modules": "query"})[1].target_modules == "query"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "fedprx"}, "no method named 'fedprx'"),
        ({"method": "fedti"}, "did you mean 'fedit'"),
        ({"num_round": 3}, "did you mean 'num_rounds'"),
        ({"method": "fedavg", "r": 4}, "method fedavg has no option 'r'"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": -3}, "r must be at least 1, got -3"),
        ({"r": "2.5"}, "r must be a whole number"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"alpha": -1}, "alpha must be above 0, got -1"),
        ({"alpha": "nan"}, "alpha must be finite"),
        ({"learning_rate": -1e-3}, "learning_rate must be above 0"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"num_rounds": True}, "num_rounds must be a whole number"),
        ({"clients_per_round": 30}, "only 20 clients"),
        ({"partition": "dirchlet"}, "did you mean 'dirichlet'"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"weighting": "size"}, "weighting must be one of samples, uniform"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"test_fraction": 1}, "test_fraction must be below 1"),
        ({"base_dropout": "maybe"}, "base_dropout must be true or false"),
    ],
)
def test_bad_values_are_named(given, words):
    with pytest.raises(UsageError, match=words):
        resolve(given)


def test_toml_errors_name_file_and_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("num_rounds = 3\nalpha = = 2\n")
    with pytest.raises(UsageError, match="line 2"):
        read_toml(path)
    path.write_text("r = 3\n[lora]\nr = 2\n")
    with pytest.raises(UsageError, match="sets 'r' twice"):
        read_toml(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_toml(tmp_path / "absent.toml")


def test_assignment_needs_an_equals_sign():
    with pytest.raises(UsageError, match="key=value"):
        read_assignment("rounds")


def test_no_option_of_a_method_shares_its_name_with_one_of_the_run():
    """They stand side by side on the command line and in config files."""
    import dataclasses

    from fastrank.federated.config import Config, method_options
    from fastrank.federated.methods import METHODS

    general = {f.name for f in dataclasses.fields(Config)}
    for name, cls in METHODS.items():
        assert not general & method_options(cls).keys(), name
