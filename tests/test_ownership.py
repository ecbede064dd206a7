"""Users get keys, files get answers: on a random-weight network, as a user of the commands would.

Most tests take an estimator that only looks for the nearest of the latents that were ever marked,
so that they try everything else; one takes the real thing.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sqlite3
import stat
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs.stylegan2 import get_config
from lfp_jax import design, fingerprint, generators, images, keys, main, ownership, sensitivity
from lfp_jax.attribution import inversion
from lfp_jax.errors import UserError
from lfp_jax.registry import Registry

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = {"bits": 24, "shift": 8, "estimator": "lm"}
COMMAND = ["lfp_jax", "--config=configs/stylegan2.py:tiny"]
COMMAND += [f"--config.{name}={value}" for name, value in SETTINGS.items()]
CONFIG = get_config("tiny")
CONFIG.update(SETTINGS)
CONFIG.lm.update(attack="none", ranks=(), jacobians=4, starts=2)


class Memory:
    """An estimator that knows all latents ever marked and looks for the nearest image."""

    def __init__(self):
        self.latents, self.calls = [], 0

    def note(self, inject, space, latents, bits, **mark):
        marked = inject(space, latents, bits, **mark)
        self.latents.append(np.asarray(marked))
        return marked

    def estimate(self, key, generator, space, images, *, strength, code, progress):
        self.calls += 1
        latents = np.concatenate(self.latents)
        made = design.decode(generator, latents)
        off = ((np.clip(made, -1, 1)[None] - images[:, None]) ** 2).mean((2, 3, 4))
        best = off.argmin(axis=1)
        bits = fingerprint.read(space, latents[best], strength=strength, code=code)
        known = off.min(axis=1) < 0.01
        soft = np.where(known[:, None], 0.01 + 0.98 * np.asarray(bits), 0.5)
        count = np.full(len(images), len(latents))
        return inversion.Solution(soft, latents[best], off.min(axis=1) ** 0.5, count)


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Stand in for the estimator, for the whole module."""
    memory, inject = Memory(), fingerprint.inject
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "inject", partial(memory.note, inject))
        memory.real = design.estimator
        patch.setattr(design, "estimator", lambda *_: (memory.estimate, 0.0))
        yield memory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder where alice and bob have keys."""
    workdir = tmp_path_factory.mktemp("owner")
    with pytest.MonkeyPatch.context() as patch:  # the compilation of the true metric takes long
        patch.setattr(sensitivity, "mean_metric", lambda *_, **__: np.eye(32))
        assert ownership.issue(CONFIG, workdir, ["alice", "bob"]) == 2
    return workdir


@pytest.fixture(scope="module")
def made(workdir):
    """Two pictures of each."""
    options = {"progress": False}
    return {
        user: ownership.generate(CONFIG, workdir, user, 2, **options) for user in ("alice", "bob")
    }


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture(scope="module")
def point(workdir):
    key = jax.random.fold_in(jax.random.key(CONFIG.seed), 0)
    return design.prepare(key, CONFIG, workdir, refit=False)


def _attribute(workdir, *paths, config=CONFIG, **options):
    return list(ownership.attribute(config, workdir, paths, progress=False, **options))


def _main(workdir, *args):
    return main.main([*COMMAND, f"--workdir={workdir}", *args])


def _plain(point, folder, n=1):
    latents = point.generator.sample(jax.random.key(99), n)
    return images.write_pngs(folder, images.to_uint8(design.decode(point.generator, latents)))


def test_every_picture_is_its_users_and_a_plain_one_nobodys(workdir, made, point, tmp_path):
    answers = _attribute(workdir, *made["alice"], *made["bob"], *_plain(point, tmp_path))
    assert [each["verdict"] for each in answers] == ["alice", "alice", "bob", "bob", "unknown"]
    for answer in answers[:4]:
        assert answer["user"] == answer["verdict"]
        assert answer["p_value"] <= answer["threshold"] == 1e-6 / 2
        assert (answer["agreeing"], answer["bits"], answer["users"]) == (24, 24, 2)
        assert answer["runner_up"]["user"] in ("alice", "bob")
        assert answer["runner_up"]["user"] != answer["user"]
        assert (answer["size"], answer["resized_to"], answer["estimator"]) == ([32, 32], None, "lm")
        assert {"soft_score", "residual", "seconds", "evaluations", "basis_sha256"} <= set(answer)
        assert {"lfp_jax", "jax", "jaxlib", "flax", "numpy"} == set(answer["versions"])
        assert answer["generator"]["sha256"] == point.generator.sha256
    assert answers[4]["user"] is None


def test_the_real_estimator_names_the_owner_or_nobody(workdir, made, memory, monkeypatch):
    # Keys and latents are new in each run, and on random weights not all can be read.
    monkeypatch.setattr(design, "estimator", memory.real)
    answers = _attribute(workdir, made["alice"][0], made["bob"][0])
    assert [each["file"] for each in answers] == [made["alice"][0], made["bob"][0]]
    for answer, owner in zip(answers, ("alice", "bob"), strict=True):
        assert answer["verdict"] in (owner, "unknown")
        assert 0 < answer["residual"] < 1
        assert answer["evaluations"] > 32


def test_a_verdict_is_entered_in_the_registry(tmp_path, workdir, made):
    [answer] = _attribute(workdir, made["bob"][0])
    with contextlib.closing(sqlite3.connect(workdir / design.REGISTRY)) as file:
        sql = "SELECT image_sha256, p_value, agreeing, key FROM verdicts ORDER BY id DESC LIMIT 1"
        assert file.execute(sql).fetchone() == (answer["image_sha256"], answer["p_value"], 24, 2)


def test_files_of_another_form_are_converted_and_it_is_said(workdir, made, tmp_path):
    picture = Image.open(made["alice"][0])
    picture.resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "1.jpg", quality=95)
    picture.convert("RGBA").save(tmp_path / "2.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "3.webp", lossless=True, exif=exif)
    answers = _attribute(workdir, tmp_path)
    assert [each["verdict"] for each in answers] == ["alice"] * 3
    assert [each["resized_to"] for each in answers] == [[32, 32], None, None]
    assert answers[0]["size"] == [96, 96]


def test_fit_keeps_what_fits_and_averages_what_shrinks():
    u8 = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.fit(u8, (8, 8, 3)), u8)
    steps = np.repeat(np.repeat(u8, 4, axis=0), 4, axis=1)
    assert np.abs(images.fit(steps, (8, 8, 3)).astype(int) - u8).mean() < 30
    flat = images.fit(np.full((40, 7, 3), 77, np.uint8), (8, 8, 1))
    assert flat.shape == (8, 8, 1) and (flat == 77).all()


def test_pooled_evidence_is_a_last_line(workdir, made):
    *single, together = _attribute(workdir, *made["alice"], pool=True)
    assert (together["file"], together["pooled"], together["verdict"]) == (None, 2, "alice")
    assert together["soft_score"] > max(each["soft_score"] for each in single)


def _bad_files(folder, picture):
    """Write files that are no image, or not one that can be judged; what is said of each."""
    content = Path(picture).read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "link.png").symlink_to(picture)
    os.mkfifo(folder / "pipe.png")
    return {
        "cut.png": "not a readable image", "empty.png": "is empty", "text.png": "no known format",
        "dot.png": "1 x 1 pixels", "bomb.png": "at most 64,000,000", "link.png": "link out of",
        "pipe.png": "no regular file",
    }  # fmt: skip


def test_bad_files_are_named_and_the_others_go_on(workdir, made, tmp_path, capsys):
    said = _bad_files(tmp_path, made["alice"][0])
    (tmp_path / "good.png").write_bytes(Path(made["bob"][0]).read_bytes())
    missing, nothing = str(tmp_path / "missing.png"), str(tmp_path / "*.gif")
    assert _main(workdir, "--mode=attribute", str(tmp_path), missing, nothing) == 1
    out, err = capsys.readouterr()
    [answer] = [json.loads(line) for line in out.splitlines()]
    assert (answer["file"], answer["verdict"]) == (str(tmp_path / "good.png"), "bob")
    said |= {"missing.png": "No such image file", "*.gif": "No file matches"}
    for name, cause in said.items():
        [line] = [line for line in err.splitlines() if f"{name}'" in line]
        assert cause in line
        assert line.endswith(".")
    assert "Traceback" not in err


def test_gather_takes_files_folders_and_patterns_and_stays_inside(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    (folder / "deep").mkdir(parents=True)
    other.mkdir()
    for place in (folder / "a.png", folder / "deep" / "b.jpg", other / "c.png", folder / "no.txt"):
        place.write_bytes(b"x")
    (folder / "linked").symlink_to(other)
    (folder / "same.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(other / "c.png")

    def gathered(*paths):
        return [(os.path.basename(path), problem is None) for path, problem in images.gather(paths)]

    inside = [("a.png", True), ("b.jpg", True), ("out.png", False), ("same.png", True)]
    assert gathered(folder) == inside
    assert gathered(folder / "out.png") == [("out.png", True)]  # named itself
    assert gathered(folder / "**" / "*.png") == [
        ("a.png", True), ("c.png", False), ("out.png", False), ("same.png", True),
    ]  # fmt: skip
    assert gathered(tmp_path / "nothing.png") == [("nothing.png", True)]  # said when it is read


def test_issue_is_quick_and_loads_no_generator(workdir, monkeypatch, tmp_path):
    monkeypatch.setattr(design, "load_generator", lambda *_, **__: pytest.fail("loaded"))
    registry = tmp_path / "copy.sqlite"
    with Registry(workdir / design.REGISTRY) as ledger, Registry(registry, create=True) as copy:
        copy.add_design(ledger.designs()[1])
    names = [f"user-{i}" for i in range(10)]
    assert ownership.issue(CONFIG, workdir, names, registry=registry) == 10
    assert ownership.has_key(CONFIG, workdir, "user-3", registry=registry)
    assert not ownership.has_key(CONFIG, workdir, "user-30", registry=registry)
    with pytest.raises(UserError, match="'user-3' already has a key"):
        ownership.issue(CONFIG, workdir, ["user-3"], registry=registry)
    with pytest.raises(UserError, match="Unknown user 'user-33'. Did you mean 'user-"):
        ownership.generate(CONFIG, workdir, "user-33", 1, registry=registry)


def test_issue_refuses_more_users_than_bits_tell_apart(tmp_path):
    with pytest.raises(UserError, match="No match is possible with 24 bits and 20 users"):
        ownership.issue(CONFIG, tmp_path, [str(i) for i in range(20)])
    assert not list(tmp_path.iterdir())


def test_pictures_are_private_new_each_time_and_without_metadata(workdir, made):
    again = ownership.generate(CONFIG, workdir, "alice", 1, progress=False)
    assert not set(again) & set(made["alice"])
    contents = {Path(path).read_bytes() for path in [*made["alice"], *made["bob"], *again]}
    assert len(contents) == 5
    for content in contents:
        chunks, at = [], 8
        while at < len(content):
            chunks.append(content[at + 4 : at + 8])
            at += 12 + int.from_bytes(content[at : at + 4], "big")
        assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    assert stat.S_IMODE(os.stat(workdir / design.REGISTRY).st_mode) == 0o600


def test_an_issue_says_how_to_make_its_pictures_again(workdir, made, point):
    with Registry(workdir / design.REGISTRY) as ledger:
        issued, key = ledger.issues("bob")[0], ledger.key("bob", design=1)
    seed = jax.random.wrap_key_data(np.array(issued.settings["seed"], np.uint32))
    latents = point.generator.sample(seed, issued.images, start=issued.start)
    marked = fingerprint.inject(point.space, latents, key.bits, **point.mark)
    u8 = images.to_uint8(design.decode(point.generator, marked))
    np.testing.assert_allclose(u8[1].astype(int), images.read(made["bob"][1]), atol=1)
    assert issued.noise == "constant"


def test_noise_of_each_picture_and_none_at_attribution(tmp_path, workdir):
    config = CONFIG.copy_and_resolve_references()
    config.noise = "unknown"
    registry = tmp_path / "r.sqlite"
    ownership.issue(config, workdir, ["alice"], registry=registry)
    options = {"registry": registry, "progress": False}
    paths = ownership.generate(config, workdir, "alice", 2, target=tmp_path, **options)
    assert _attribute(workdir, paths[0], registry=registry, config=config)[0]["user"] == "alice"
    with pytest.raises(UserError, match="issued with noise 'unknown', not 'constant'"):
        _attribute(workdir, paths[0], registry=registry)
    config.noise = "known"
    with pytest.raises(UserError, match="noise must be one of constant, unknown here"):
        _attribute(workdir, paths[0], registry=registry, config=config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strength": 2.0}, r"Keys were issued for strength 4.0, not 2.0"),
        ({"shift": 4}, "shift 8, not 4"),
        ({"seed": 5}, "was made with seed 0, not 5. Users' keys rest on it"),
        ({"basis": "pca"}, "was made with directions sensitivity, not pca"),
    ],
)
def test_another_design_point_than_the_registrys_is_refused(changes, says, workdir, made):
    config = CONFIG.copy_and_resolve_references()
    config.update(changes)
    with pytest.raises(UserError, match=says):
        _attribute(workdir, made["alice"][0], config=config)


def test_another_generator_than_the_registrys_is_refused(workdir, made, monkeypatch):
    other = design.load_generator("stylegan2-tiny").replace(sha256="f" * 64)
    monkeypatch.setattr(design, "load_generator", lambda *_, **__: other)
    with pytest.raises(UserError, match=f"made with sha256 .*, not {'f' * 64}"):
        _attribute(workdir, made["alice"][0])


def test_neither_basis_nor_registry_is_made_by_attribution(tmp_path, workdir, made):
    with pytest.raises(UserError, match="There is no registry"):
        _attribute(tmp_path, made["alice"][0])
    with pytest.raises(UserError, match="There is no basis"):
        _attribute(tmp_path, made["alice"][0], registry=workdir / design.REGISTRY)
    assert not list(tmp_path.iterdir())


def test_a_cut_run_keeps_its_lines_and_no_line_holds_a_key(workdir, made, memory, capsys):
    honest, before = memory.estimate, memory.calls

    def estimate(*args, **options):
        if memory.calls > before:
            raise KeyboardInterrupt
        return honest(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "estimate", estimate)
        assert _main(workdir, "--mode=attribute", *made["alice"]) == 130
    out, err = capsys.readouterr()
    assert [json.loads(line)["user"] for line in out.splitlines()] == ["alice"]
    with Registry(workdir / design.REGISTRY) as ledger:
        written = keys.to_hex(ledger.key("alice", design=1).bits)
    assert written.replace("-", "")[:6] not in (out + err).replace(made["alice"][0], "")


def test_the_commands_from_users_to_a_table(tmp_path, workdir, capsys):
    place = f"--registry={tmp_path / 'r.sqlite'}"
    assert _main(workdir, "--mode=issue", "--user=carol", place) == 0
    assert _main(workdir, "--mode=issue", "--user=team", "--count=12", place) == 0
    target = tmp_path / "pictures"
    generate = ["--mode=generate", "--user=team-07", "--n=2", f"--target={target}", place]
    assert _main(workdir, *generate) == 0
    out = capsys.readouterr().out
    assert "Issued: a key to 'carol'" in out
    assert "12 users, 'team-01' to 'team-12'" in out
    assert f"Images of 'team-07': 2, {target}" in out
    args = ["--mode=attribute", str(target), "--format=table", "--pool", "--rate=1e-5", place]
    assert _main(workdir, *args) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["verdict", "p-value", "threshold", "bits", "residual", "file"]
    assert [line.split()[0] for line in rows] == ["team-07"] * 3
    assert rows[2].endswith("(2 files together)")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--mode=issue"], "--mode=issue needs --user=NAME"),
        (["--mode=issue", "--user=unknown"], "A user cannot be called 'unknown'"),
        (["--mode=issue", "--user=x", "--count=2", "--export=e"], "--export is for one user"),
        (["--mode=generate", "--user=alice"], "--mode=generate needs --n=COUNT"),
        (["--mode=generate", "--user=alice", "--n=0"], "--n=0"),
        (["--mode=generate", "--user=alicia", "--n=1"], "Did you mean 'alice'?"),
        (["--mode=attribute"], "needs files or folders"),
        (["--mode=attribute", "a.png", "--rate=2"], "between 0 and 1; got 2.0"),
        (["--mode=attribute", "a.png", "--user=alice"], "--user is for --mode=issue and"),
        (["--mode=generate", "--pool"], "--pool is for --mode=attribute"),
        (["--mode=attribute", "a.png", "--registry=no.sqlite"], "There is no registry"),
        (["--mode=attribute", "a.png", "--registry=setup.cfg"], "is not a registry"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args, says, workdir, capsys):
    assert _main(workdir, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("lfp_jax: error: ")
    assert says in error
    assert error.count("\n") == 1


def test_a_full_disk_is_one_line_and_status_1(workdir, monkeypatch, capsys):
    def write(path, u8):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(images, "write_png", write)
    assert _main(workdir, "--mode=generate", "--user=bob", "--n=1") == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.endswith(".png': No space left on device. Free some space.")


def test_an_exported_generator_makes_the_users_images(workdir, point, tmp_path, capsys):
    target = tmp_path / "alices"
    assert _main(workdir, "--mode=issue", "--user=alice", f"--export={target}") == 0
    assert "Generator of 'alice'" in capsys.readouterr().out
    w = point.generator.sample(jax.random.key(7), 3)
    with Registry(workdir / design.REGISTRY) as ledger:
        key, issued = ledger.key("alice", design=1), ledger.issues("alice")[-1]
    marked = fingerprint.inject(point.space, w, key.bits, **point.mark)
    wanted = design.decode(point.generator, marked)
    for name in ("generator", "generator.pt"):
        exported = generators.load(target / name)
        made = design.decode(exported, w)
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-4)
    assert issued.kind == "generator"
    paths = images.write_pngs(tmp_path / "made", images.to_uint8(made))
    assert [each["verdict"] for each in _attribute(workdir, *paths)] == ["alice"] * 3


def test_export_gives_a_new_user_a_key_and_refuses_other_generators(workdir, point, tmp_path):
    place = ["--mode=issue", f"--registry={tmp_path / 'r.sqlite'}"]
    assert _main(workdir, *place, "--user=dora", f"--export={tmp_path / 'e'}") == 0
    with pytest.raises(UserError, match="Only a StyleGAN2 folds"):
        other = type("Other", (), {"name": "ldm"})()
        fingerprint.fold(point.space, other, np.zeros(24), **point.mark)


def test_a_rosinality_file_keeps_every_weight(point, tmp_path):
    arch = dataclasses.replace(point.generator.arch, mapping_lr=0.02, fir=(1, 2, 1))
    generator = point.generator.replace(arch=arch)
    generators.save_rosinality(tmp_path / "g.pt", generator)
    again = generators.load(tmp_path / "g.pt")
    assert again.arch == dataclasses.replace(arch, mapping_lr=0.01)
    jax.tree.map(np.testing.assert_array_equal, again.synthesis, generator.synthesis)
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, again.mapping, jax.tree.map(lambda x: 2.0 * x, generator.mapping))
    for left, right in zip(again.noise, generator.noise, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_doctor_tells_of_each_step(tmp_path, workdir, capsys):
    assert _main(workdir, "--mode=doctor") == 0
    out = capsys.readouterr().out
    steps = ["machine", "versions", "generator", "key", "image", "plain", "attributed"]
    assert [line.split()[0] for line in out.splitlines()] == [*steps, "attributed", "verdict"]
    assert "doctor (expected: doctor)" in out
    assert "unknown (expected: unknown)" in out
    assert out.endswith("all is well\n")


def test_the_doctor_says_when_it_is_not_well(workdir, memory, monkeypatch, capsys):
    def blind(key, generator, space, images, **_):
        n, shape = len(images), (len(images), CONFIG.bits)
        return inversion.Solution(np.full(shape, 0.5), np.zeros((n, 32)), *np.ones((2, n)))

    monkeypatch.setattr(memory, "estimate", blind)
    assert _main(workdir, "--mode=doctor") == 1
    assert "NOT as expected" in capsys.readouterr().out


def test_keys_with_a_payload_are_read_with_a_registry_and_without(workdir, tmp_path):
    config = CONFIG.copy_and_resolve_references()
    config.payload = 6
    shutil.copytree(workdir / "basis", tmp_path / "basis")
    options = {"rate": 1e-3}
    ownership.issue(config, tmp_path, ["carol"], **options)
    ownership.issue(config, tmp_path, ["dave"], **options)
    made = ownership.generate(config, tmp_path, "dave", 1, progress=False)
    [named] = _attribute(tmp_path, *made, config=config, **options)
    assert (named["verdict"], named["users"]) == ("dave", 2)
    for file in tmp_path.glob("registry.sqlite*"):
        file.unlink()
    [numbered] = _attribute(tmp_path, *made, config=config, **options)
    assert (numbered["verdict"], numbered["users"]) == ("number 2", 64)
    plain = tmp_path / "plain.png"
    images.write_png(plain, np.zeros((16, 16, 3), np.uint8))
    [nobody] = _attribute(tmp_path, plain, config=config, **options)
    assert nobody["verdict"] == "unknown"


def test_a_payload_needs_the_antipodal_code(workdir):
    config = CONFIG.copy_and_resolve_references()
    config.update(payload=6, code="binary")
    with pytest.raises(UserError, match="payload=6 needs code=antipodal; got code=binary."):
        ownership.issue(config, workdir, ["erin"])
