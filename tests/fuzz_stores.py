"""Readers of the native store, for tests/test_fuzz.py."""

import json
import tempfile
import types
from pathlib import Path

import numpy as np
from fuzz_readers import reader
from fuzz_weights import READERS as READERS
from fuzz_weights import filled, read_model, small, stylegan2


def _write_generator(folder):
    from lfp_jax import generators

    generators.save(folder / "a", stylegan2(), source_format="lfp_jax", licence="none")


def _swollen_store():
    """A store one of whose arrays says that it is huge, though hardly any of it is written."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _write_generator(folder)
        _swell(folder / "a" / "arrays")
        return {
            "a huge array": {
                str(path.relative_to(folder)): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file()
            }
        }


def _swell(arrays):
    """Rewrite the metadata of an array of an Orbax store."""
    import tensorstore

    kinds = {"driver": "ocdbt", "base": f"file://{arrays}/"}
    values = tensorstore.KvStore.open(kinds).result()
    name = b"w_avg/.zarray"
    changed = json.loads(values.read(name).result().value) | {"shape": [2**30], "chunks": [2**20]}
    values.write(name, json.dumps(changed).encode()).result()


_STORED = ("metadata.json", "")  # the one half of the time, any file the other half
reader(
    "store of a generator",
    _write_generator,
    read_model("a"),
    hostile=_swollen_store,
    damaged=_STORED,
    cost=30,
)


def _write_diffusion(folder):
    import jax
    import test_ldm

    from lfp_jax import generators
    from lfp_jax.generators import assemble

    made = filled(lambda: assemble.random_latent_diffusion(jax.random.key(0), test_ldm.TINY))
    generators.save(folder / "a", made, source_format="lfp_jax", licence="none")


reader(
    "store of latent diffusion", _write_diffusion, read_model("a"), damaged=_STORED,
    cost=50,
)  # fmt: skip


def _config():
    from configs import stylegan2

    config = stylegan2.get_config()
    config.bits, config.shift, config.equalise = 2, 0, True
    return config


def _write_basis(folder):
    from lfp_jax import design
    from lfp_jax.weights import store

    components = np.linalg.qr(small(6, 6))[0]
    arrays = {"mean": small(6), "components": components, "stddev": np.ones(6, np.float32)}
    metadata = {"kind": "basis", "generator": "demo", "sha256": "ab", "pixels": 12}
    metric = np.eye(6, dtype=np.float32)
    metadata |= design.basis_settings(_config())
    store.save(folder / "basis", {"basis": arrays, "metric": metric}, metadata)


def _read_basis(folder):
    from lfp_jax import design
    from lfp_jax.report import spectrum

    spectrum.read(folder / "basis")
    design.stored_basis(_config(), folder)


reader("store of directions", _write_basis, _read_basis, damaged=_STORED, cost=30)

_SPACE = types.SimpleNamespace(
    mean=np.zeros(6), carrier=np.eye(6)[:, :2], nuisance=np.eye(6)[:, 2:]
)
_OWNER = types.SimpleNamespace(name="demo", sha256="ab")


def _write_estimator(folder):
    from lfp_jax.attribution import estimator

    arch = estimator.Architecture()
    design = estimator.Design("demo", "ab", 2, 4, 1.0, "antipodal")
    params = {"network": {"kernel": small(3, 4)}, "log_variance": small(2, 4)}
    made = estimator.Estimator(params, estimator._probe(_SPACE), small(6), arch, design)
    estimator.save(folder / "a", made)


def _read_estimator(folder):
    from lfp_jax.attribution import estimator

    estimator.load(folder / "a", _OWNER, _SPACE, strength=1.0, code="antipodal")


reader("store of an estimator", _write_estimator, _read_estimator, damaged=_STORED, cost=30)


def _write_classifier(folder):
    import jax

    from lfp_jax.metrics import features

    choices = {"eyes": ["open", "shut"], "hair": ["none", "long"]}
    made = filled(lambda: features.init(jax.random.key(0), choices=choices))
    reference = np.zeros(128), np.eye(128)
    features.save(folder / "a", made, {"made": "up"}, reference=reference)


def _read_classifier(folder):
    from lfp_jax.metrics import features

    features.load_classifier(path=str(folder / "a"))
    features.load_reference(path=str(folder / "a"))


reader("store of a classifier", _write_classifier, _read_classifier, damaged=_STORED, cost=50)


def _write_checkpoint(folder):
    from lfp_jax.weights import store

    manager = store.checkpoints(folder / "checkpoints")
    store.save_step(manager, 3, {"w": small(3, 4), "step": np.array(3)})
    manager.close()


def _read_checkpoint(folder):
    from lfp_jax.weights import store

    manager = store.checkpoints(folder / "checkpoints")
    step = manager.latest_step()
    if step is not None:
        store.restore_step(manager, step, like={"w": small(3, 4), "step": np.array(0)})
    manager.close()


reader("checkpoint of training", _write_checkpoint, _read_checkpoint, cost=50)
