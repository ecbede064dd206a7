"""Documents: their code runs, their links lead somewhere, what they name exists."""

import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import lfp_jax
from lfp_jax import design, main, options

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parent.parent
SITE = sorted(ROOT.glob("docs/**/*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *SITE, ROOT / "launch" / "README.md"])
MODES = [page for page in SITE if page.parent.name == "modes"]


def _text(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def _name(page):
    return str(page.relative_to(ROOT))


def _blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", _text(page), flags=re.DOTALL)


def _run(page):
    """Run the Python blocks of a page one after another, as one script; give what they define."""
    names = {"__name__": "page"}
    for block in _blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    here = [target for target in targets if "://" not in target]
    assert not [target for target in here if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_name_files_that_exist(page):
    named = re.findall(r"(?:configs|launch|docs|tests)/[\w/]+\.\w+", page.read_text("utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def _commands(page):
    """Read the command line of each `lfp_jax.main` in the bash blocks of a page."""
    for line in "\n".join(_blocks(page, "bash")).replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if "lfp_jax.main" in words:
                yield options.parse(words[words.index("lfp_jax.main") :])


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_have_only_modes_flags_and_fields_that_there_are(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for values, paths in _commands(page):  # whatever is wrong was an error by now
        assert bool(paths) == (values.mode == "attribute")


def test_the_mathematics_names_what_there_is():
    named = re.findall(r"`(lfp_jax/[\w/]+)\.py`\s+\(([^)]*)\)", _text("docs", "mathematics.md"))
    assert len(named) > 10
    for path, functions in named:
        module = importlib.import_module(path.replace("/", "."))
        for function in re.findall(r"`(\w+)`", functions):
            assert hasattr(module, function), f"{path}: {function}"


@pytest.mark.parametrize("name", ["stylegan2-demo", "ldm-demo"])
def test_a_pass_takes_the_operations_that_the_launches_say(name):
    generator = design.load_generator(name)
    latent = jax.ShapeDtypeStruct((1, *generator.latent_shape), np.float32)
    counted = jax.jit(lambda g, w: g.decode(w)).lower(generator, latent).cost_analysis()["flops"]
    config = "stylegan2" if name == "stylegan2-demo" else "ldm"
    [row] = re.findall(rf"^\| `{config}\.py` \| ([\d.]+) .*$", _text("launch", "README.md"), re.M)
    np.testing.assert_allclose(float(row), counted / 1e9, rtol=0.01)


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
    """Run the examples, and take out again what they add."""
    from lfp_jax import attacks

    before = dict(attacks.FUNCTIONS), dict(attacks.SUITES)
    yield _run("docs/adding.md")
    for table, entries in zip((attacks.FUNCTIONS, attacks.SUITES), before, strict=True):
        table.clear()
        table.update(entries)


def test_examples_are_short():
    blocks = _blocks("docs/adding.md", "python")
    assert len(blocks) == 4
    assert max(block.count("\n") for block in blocks) < 30


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


# --- modes ----------------------------------------------------------------------------------------


def _default(config):
    return "train" if config.get("task") else "experiment"


def test_each_mode_has_a_page_that_shows_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = {page.stem: page for page in MODES if page.stem != "index"}
    assert set(pages) == set(options.MODES)
    for mode, page in pages.items():
        assert mode in [values.mode or _default(values.config) for values, _ in _commands(page)]
        flags = [name for name, modes in options._BELONG.items() if mode in modes]
        assert not [name for name in flags if f"`--{name}`" not in _text(page)], mode


@pytest.mark.parametrize("page", MODES, ids=_name)
def test_mistakes_are_told_as_the_page_says(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    lines = "".join(_blocks(page, "console")).splitlines()
    assert lines
    for command, answer in zip(lines[::2], lines[1::2], strict=True):
        words = shlex.split(command)
        assert main.main(words[words.index("lfp_jax.main") :]) == 2
        beginning, cut, _ = answer.partition(" ...")  # long lines are cut
        said = capsys.readouterr().err
        assert said.startswith(beginning) if cut else said == f"{answer}\n"


def test_the_parts_of_an_experiment_in_python_are_keys_and_noisy_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it writes the basis
    names = _run("docs/modes/experiment.md")
    assert names["truth"].shape == (names["config"].images, names["config"].bits)
    assert names["seen"].shape == names["marked"].images.shape
    assert 0.08 < (names["seen"] - names["marked"].images).std() < 0.12


def test_a_verdict_in_python_names_the_right_user_or_nobody(capsys):
    found = _run("docs/modes/attribute.md")["found"]
    assert (found.user, found.agreeing) == (7, 58)
    assert capsys.readouterr().out.endswith("None\n")


def test_the_sweep_that_is_shown_changes_fields_that_there_are():
    from configs import stylegan2_grid
    from lfp_jax import experiment, grid

    sweep = _run("docs/modes/grid.md")["sweep"]
    cells = grid.expand(stylegan2_grid.get_config("tiny"), sweep, experiment.Bench())
    assert len(cells) == 2 * (1 + 4) + 1
    assert cells[-1].config.lm.ranks == (32, 64)


# --- the site -------------------------------------------------------------------------------------


def _listed(nav):
    """Give the files of a navigation, a list of names and of {heading: name or list}."""
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else _listed(value)


def test_the_navigation_has_every_page_once():
    listed = list(_listed(yaml.safe_load(_text("mkdocs.yml"))["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in SITE)


def test_the_reference_has_every_module_once():
    modules = pkgutil.walk_packages(lfp_jax.__path__, "lfp_jax.")
    names = ["lfp_jax", *(module.name for module in modules)]
    names.remove("lfp_jax.main")  # what it says is the text of --help, and no Markdown
    pages = [page for page in SITE if page.parent.name == "reference"]
    shown = re.findall(r"^::: (\S+)$", "\n".join(map(_text, pages)), flags=re.MULTILINE)
    assert sorted(shown) == sorted([*names, "lfp_jax.main.main"])


def test_the_site_is_built_without_a_warning_and_asks_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) == len(SITE) + 1  # that of pages not found
    elsewhere = r"<(?:script|link|img|iframe)[^>]* (?:src|href)=\"?(?:https?:)?//[^>]*>"
    assert not [found for page in pages for found in re.findall(elsewhere, page.read_text("utf-8"))]


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
