"""The house rules, read off the source: import order, argument style, docstrings, disk access."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lfp_jax"
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in ("__init__", "common")
]

# An import points from right to left in this row; within one entry it may point anywhere.
ORDER = [
    "images", "weights", "generators", "sensitivity", "basis", "fingerprint", "keys", "shallow",
    "registry", "attacks", "metrics", "attribution", "payload", "adversary", "report", "training",
    "design", "quality", "enrolment", "court", "ownership", "desk", "planner", "experiment",
    "cells", "grid", "options", "main",
]  # fmt: skip
LEAVES = {
    "errors",
    "files",
    "sharding",
    "logs",
    "seeds",
}  # imported by all, and import one another only
DISK = {"files", "weights", "images", "registry", "logs", "report", "training.data", "cells"}
SEE_CONFIGS = {
    "design", "enrolment", "court", "ownership", "desk", "planner", "experiment", "grid",
    "options", "main",
}  # fmt: skip

# Options that the stable names of the design let callers give by position.
POSITIONAL_DEFAULTS = {"generators.stylegan2.StyleGAN2.map"}
# Functions of two like arguments, which a key in front would part: {"module.function"}.
KEY_NOT_FIRST = {"metrics.distances.frechet_interval"}

DISK_CALLS = {
    "open", "fdopen", "write_text", "write_bytes", "read_text", "read_bytes", "mkdir", "makedirs",
    "rmdir", "unlink", "rmtree", "rename", "touch", "savetxt", "loadtxt", "tofile", "fromfile",
    "memmap", "savefig", "imsave", "imread", "NamedTemporaryFile", "TemporaryDirectory", "mkdtemp",
    "mkstemp", "copyfile", "copytree", "np.load", "np.save", "np.savez", "np.savez_compressed",
    "jnp.load", "jnp.save", "os.remove", "os.replace", "files.replacing", "files.sha256",
    "pickle.load", "pickle.dump",
}  # fmt: skip


def _modules():
    """Give (dotted name below lfp_jax, syntax tree) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


MODULES = dict(_modules())
NAMED = pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "lfp_jax")


def _imports(tree):
    """Give every imported dotted name, at the top and inside functions; relative ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _functions(tree):
    """Give (dotted name, function, is a method) of public functions, and of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    static = "staticmethod" in (ast.unparse(d) for d in item.decorator_list)
                    yield f"{node.name}.{item.name}", item, not static


def _is_public(name):
    return not any(part.startswith("_") for part in name.split("."))


@NAMED
def test_imports_point_one_way(name):
    if not name:
        return  # lfp_jax/__init__.py hands out names of all modules, on first use
    own = name.split(".")[0]
    assert own in LEAVES | set(ORDER), f"give '{own}' its place in ORDER"
    for imported in _imports(MODULES[name]):
        package, _, rest = imported.partition(".")
        other = rest.split(".")[0]
        if package != "lfp_jax" or other not in LEAVES | set(ORDER) or other == own:
            continue
        allowed = LEAVES if own in LEAVES else LEAVES | set(ORDER[: ORDER.index(own)])
        assert other in allowed, f"{name} imports {imported}"


@NAMED
def test_configs_stay_above_the_experiment(name):
    if name.split(".")[0] in SEE_CONFIGS:
        return
    packages = {imported.split(".")[0] for imported in _imports(MODULES[name])}
    assert not packages & {"configs", "ml_collections"}


@NAMED
def test_only_some_modules_touch_the_disk(name):
    if any(name == place or name.startswith(f"{place}.") for place in DISK):
        return
    for node in ast.walk(MODULES[name]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert not {called, called.split(".")[-1]} & DISK_CALLS, f"line {node.lineno}: {called}"


@NAMED
def test_what_is_public_has_a_docstring(name):
    tree = MODULES[name]
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
    for label, function, _ in _functions(tree):
        if _is_public(label) and label.split(".")[-1] != "setup":
            assert ast.get_docstring(function), label


@NAMED
def test_key_comes_first(name):
    for label, function, is_method in _functions(MODULES[name]):
        arguments = function.args
        listed = [a.arg for a in arguments.posonlyargs + arguments.args][int(is_method) :]
        every = listed + [a.arg for a in arguments.kwonlyargs]
        if "key" in every and f"{name}.{label}" not in KEY_NOT_FIRST:
            assert every[0] == "key", label


@NAMED
def test_options_are_keyword_only(name):
    for label, function, _ in _functions(MODULES[name]):
        # A network is called `d(images, label)`: its __call__ may have them by position.
        if not label.endswith("__call__") and f"{name}.{label}" not in POSITIONAL_DEFAULTS:
            assert not function.args.defaults, label


@NAMED
def test_key_has_no_default(name):
    for label, function, _ in _functions(MODULES[name]):
        pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        assert not any(a.arg == "key" and default for a, default in pairs), label


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_its_command(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert f"python -m lfp_jax.main --config=configs/{path.name}" in ast.get_docstring(tree)
    assert "get_config" in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_ci_runs_the_test_command_of_the_readme():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    # Once on the Python that is, once on the other one; what is slow is no part of it.
    command, other = [line for line in lines if "-m pytest" in line and "-m slow" not in line]
    assert command.partition("-m pytest")[2] == other.partition("-m pytest")[2]
    assert command.strip().replace(" --quiet", "") in readme.read_text(encoding="utf-8")
