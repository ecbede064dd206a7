"""The command line: a user's mistake is one line and status 2, whatever the mistake."""

import subprocess
import sys
import time
import types

import pytest

from lfp_jax import main, options

CONFIG = "--config=configs/stylegan2.py:tiny"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture
def calls(monkeypatch):
    """Stand in for the modules below main, and note what they are called with."""
    seen = []
    modules = {
        "lfp_jax.experiment": types.SimpleNamespace(run=lambda *a: seen.append(("run", a))),
        "lfp_jax.training.gan": types.SimpleNamespace(train=lambda **k: seen.append(("gan", k))),
        "lfp_jax.training.classifier": types.SimpleNamespace(
            train=lambda **k: seen.append(("classifier", k))
        ),
        "lfp_jax.generators": types.SimpleNamespace(
            convert=lambda *a: seen.append(("convert", a)), describe=lambda _: "a generator"
        ),
    }
    monkeypatch.setattr(main.importlib, "import_module", modules.__getitem__)
    return seen


def _main(*args):
    return main.main(["lfp_jax", *args])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--config=FILE is missing"),
        (["--config"], "--config needs a file"),
        (["--config="], "--config needs a file"),
        (["--config=configs/stylegan.py"], "Did you mean 'configs/stylegan2.py'?"),
        (["--config=nowhere/a.py"], "No config file 'nowhere/a.py'"),
        (["--config=setup.cfg"], "No config file 'setup.cfg'"),
        (["--config=lfp_jax/errors.py"], "needs a file with get_config(arg)"),
        (["--config=configs/stylegan2.py:tinny"], "Unknown config switch 'tinny'. Did you mean"),
        ([CONFIG, "--config.bitz=3"], "Unknown config field 'bitz'. Did you mean 'bits'?"),
        ([CONFIG, "--config.bits.x=3"], "there is no 'x' below a plain value"),
        ([CONFIG, "--config.bits=1.5"], "1.5"),
        ([CONFIG, "--config.strength=high"], "high"),
        (["--config.bits=3", CONFIG], "before a value for --config"),
        ([CONFIG, "--mode=experimant"], "experiment|grid|plan|report|train|convert"),
        ([CONFIG, "--mode=train"], "it is for --mode=experiment"),
        ([CONFIG, "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ([CONFIG, "again"], "Unexpected argument 'again'"),
        (["--mode=convert", "--source=a.pt"], "--target"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args, says, capsys):
    assert _main(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("lfp_jax: error: ")
    assert says in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_experiment_gets_the_config_with_its_overrides(calls, tmp_path):
    assert _main(CONFIG, "--config.strength=2", f"--workdir={tmp_path}") == 0
    [(name, (config, workdir))] = calls
    assert (name, config.strength, workdir) == ("run", 2.0, tmp_path)


def test_overrides_may_stand_apart_from_their_values(calls):
    assert _main("--config", "configs/stylegan2.py:tiny", "--config.bits", "5") == 0
    [(_, (config, workdir))] = calls
    assert (config.bits, str(workdir)) == (5, "runs/stylegan2")


@pytest.mark.parametrize(("task", "trainer"), [("stylegan2", "gan"), ("classifier",) * 2])
def test_train_gets_plain_keywords(task, trainer, calls, tmp_path):
    file = tmp_path / "train_it.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        f"    return ml_collections.ConfigDict({{'task': '{task}', 'adam': {{'b1': 0.0}}}})\n"
    )
    assert _main(f"--config={file}", "--config.adam.b1=0.5") == 0
    [(name, keywords)] = calls
    assert name == trainer
    assert str(keywords.pop("workdir")) == "runs/train_it"
    assert keywords == {"adam": {"b1": 0.5}}
    assert type(keywords["adam"]) is dict


def test_convert_needs_no_config_and_says_what_it_read(calls, capsys):
    assert _main("--mode=convert", "--source=a.pt", "--target=b") == 0
    assert calls == [("convert", ("a.pt", "b"))]
    assert capsys.readouterr().out == "a generator\nWeights: b/\n"


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "parse", interrupt)
    assert _main() == 130
    assert capsys.readouterr().err == "\nlfp_jax: interrupted\n"


def test_help_is_quick_and_imports_no_jax():
    code = "import sys, lfp_jax.main as m; m.main(['x', '--help']); sys.exit('jax' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--mode=attribute" in done.stdout
    assert time.monotonic() - start < 10
