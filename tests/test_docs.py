"""Documents: their code runs, their links lead somewhere, what they name exists."""

import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import lfp_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "launch" / "README.md"])


def _text(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    here = [target for target in targets if "://" not in target]
    assert not [target for target in here if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_that_exist(page):
    named = re.findall(r"(?:configs|launch|docs|tests)/[\w/]+\.\w+", page.read_text("utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_mathematics_names_what_there_is():
    named = re.findall(r"`(lfp_jax/[\w/]+)\.py`\s+\(([^)]*)\)", _text("docs", "mathematics.md"))
    assert len(named) > 10
    for path, functions in named:
        module = importlib.import_module(path.replace("/", "."))
        for function in re.findall(r"`(\w+)`", functions):
            assert hasattr(module, function), f"{path}: {function}"


def test_the_share_of_signal_is_as_the_mathematics_says():
    text = " ".join(_text("docs", "mathematics.md").split())
    assert "at strength 2 half of the change is signal, at strength 4 four fifths" in text
    rng = np.random.default_rng(0)
    a, c = rng.standard_normal(200_000), rng.integers(0, 2, 200_000) - 0.5
    for strength, share in ((2.0, 0.5), (4.0, 0.8)):
        change = np.mean((strength * c - a) ** 2)
        np.testing.assert_allclose(strength**2 / 4.0 / change, share, rtol=0.01)


# --- adding something -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def added(quick_compilation):
    """Run the examples one after another, as one script; give what they define."""
    from lfp_jax import attacks

    before = dict(attacks.FUNCTIONS), dict(attacks.SUITES)
    names = {"__name__": "added"}
    for block in _blocks():
        exec(compile(block, "docs/adding.md", "exec"), names)
    yield names
    for table, entries in zip((attacks.FUNCTIONS, attacks.SUITES), before, strict=True):
        table.clear()
        table.update(entries)


def _blocks():
    return re.findall(r"```python\n(.*?)```", _text("docs", "adding.md"), flags=re.DOTALL)


def test_examples_are_short():
    assert len(_blocks()) == 4
    assert max(block.count("\n") for block in _blocks()) < 30


def test_an_added_generator_gets_its_bits_back(added):
    np.testing.assert_array_equal(added["found"].bits, added["users"])
    assert len(np.unique(added["users"], axis=0)) == 2
    generator, key = added["generator"], added["key"]
    np.testing.assert_array_equal(generator.sample(key, 1, start=1), generator.sample(key, 2)[1:])


def test_an_added_attack_is_in_its_suite_and_bounded(added):
    from lfp_jax import attacks
    from lfp_jax.errors import UserError

    assert attacks.find("lenses:vignette-0.5").steps[0][0] == "vignette"
    pictures, key = added["pictures"], added["key"]
    same = attacks.apply(key, pictures, attacks.attack("vignette", amount=0.0))
    np.testing.assert_array_equal(same, pictures)
    assert added["darker"].mean() < pictures.mean()
    np.testing.assert_allclose(added["vignette"](key, pictures, amount=1.0)[:, 0, 0], -1.0)
    with pytest.raises(UserError, match="amount of 'vignette' must be in 0 .. 1; got 2"):
        attacks.attack("vignette", amount=2.0)


def test_an_added_metric_is_one_for_equal_images(added):
    detail, pictures = added["detail"], added["pictures"]
    np.testing.assert_allclose(jax.vmap(detail)(pictures, pictures), 1.0)
    np.testing.assert_allclose(detail(0.5 * pictures[0], pictures[0]), 0.25, rtol=1e-5)


# --- small files ----------------------------------------------------------------------------------


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load(_text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == lfp_jax.__version__
    paper = citation["preferred-citation"]
    assert "2304.09752" in paper["doi"]
    assert [author["family-names"] for author in paper["authors"]] == ["Nie", "Kim", "Yang", "Ren"]
    assert paper["title"] in _text("README.md")


def test_hooks_do_what_must_pass():
    hooks = yaml.safe_load(_text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    wanted = {line for line in _text(".ci", "run").splitlines() if line.startswith("ruff ")}
    assert wanted == {"ruff check", "ruff format --check"}
    assert {hook["name"] for hook in hooks} == {line.removesuffix(" --check") for line in wanted}
    assert all(hook["entry"].startswith(hook["name"]) for hook in hooks)


def test_changes_not_yet_released_have_their_place():
    heads = re.findall(r"^## (.+)$", _text("CHANGELOG.md"), flags=re.MULTILINE)
    assert heads[0] == "Unreleased"


def test_contributing_tells_the_test_command():
    assert "python3 -m pytest -n auto" in _text("CONTRIBUTING.md")
