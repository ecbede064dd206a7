"""Configs: switches are read strictly, and a sweep changes only fields that exist."""

import importlib
from pathlib import Path

import pytest

from configs.common import parse_arg
from lfp_jax.errors import UserError

NAMES = [
    path.stem
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
    if path.stem not in ("__init__", "common")
]


def test_parse_arg_reads_flags_and_values():
    read = parse_arg("tiny, strength=2,name=a", tiny=False, strength=1.0, name="", bits=64)
    assert vars(read) == {"tiny": True, "strength": 2.0, "name": "a", "bits": 64}
    assert type(read.strength) is float
    assert vars(parse_arg("", tiny=False)) == {"tiny": False}
    assert parse_arg("tiny=false", tiny=True).tiny is False


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("tinny", "Unknown config switch 'tinny'. Did you mean 'tiny'"),
        ("tiny=5", "'tiny' must be of type bool; got '5'"),
        ("strength=high", "'strength' must be of type float; got 'high'"),
        ("strength", "'strength' must be of type float; got ''"),
    ],
)
def test_parse_arg_says_what_is_wrong(arg, says):
    with pytest.raises(UserError, match=says):
        parse_arg(arg, tiny=False, strength=1.0)
    with pytest.raises(UserError, match="has no switches; got 'tiny'"):
        parse_arg("tiny")


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_changes_only_fields_of_its_config(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config().lock()
    cells = []
    if hasattr(module, "sweep"):
        module.sweep(lambda **changes: cells.append(changes))
        assert cells
    for changes in cells:
        config.update_from_flattened_dict(changes)
