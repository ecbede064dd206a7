"""Readers of foreign weights, for tests/test_fuzz.py."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import nvlabs_writer
import pickle_writer
from fuzz_readers import READERS as READERS
from fuzz_readers import reader


def small(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def _torch_body(torch):
    tensors = {"w": torch.tensor(small(3, 4)), "b": torch.tensor(np.arange(3))}
    namespace = pickle_writer.call(pickle_writer.named("argparse", "Namespace"))
    settings = namespace + pickle_writer.plain({"size": 64, "names": ["a", "b"]}) + b"b"
    return pickle_writer.mapping(tensors | {"args": settings})


def _write_torch(form):
    def write(folder):
        torch = pickle_writer.Torch()
        body = _torch_body(torch)
        (folder / "a.pt").write_bytes(getattr(torch, form)(body))

    return write


def _read_pickle(folder):
    from lfp_jax.weights import pickles

    pickles.read(folder / "a.pt")


def _runs_code():
    """Pickles that would run something, in each of the three forms."""
    command = pickle_writer.plain("touch RAN")
    bodies = {
        "system": pickle_writer.call(pickle_writer.named("os", "system"), command),
        "Popen": pickle_writer.named("subprocess", "Popen") + b"(" + command + b"t\x81",
        "open": pickle_writer.call(
            pickle_writer.named("io", "open"), pickle_writer.plain("RAN"), pickle_writer.plain("w")
        ),
        "eval": pickle_writer.call(
            pickle_writer.named("builtins", "eval"), pickle_writer.plain("open('RAN', 'w')")
        ),
    }
    found = {}
    for name, body in bodies.items():
        hidden = pickle_writer.mapping({"unused": body})
        found |= {
            f"{name} in a zip": {"a.pt": pickle_writer.Torch().zip(hidden)},
            f"{name} in an older file": {"a.pt": pickle_writer.Torch().legacy(hidden)},
            f"{name} in a pickle": {"a.pt": pickle_writer.file(body)},
        }
    return found


def _write_nvlabs(folder):
    module = pickle_writer.nvlabs_module("Generator", tensors={"w": small(3, 4)}, z_dim=4)
    content = pickle_writer.file(pickle_writer.mapping({"G": module}), protocol=3)
    (folder / "a.pt").write_bytes(content)


reader("torch zip", _write_torch("zip"), _read_pickle, hostile=_runs_code)
reader("torch older", _write_torch("legacy"), _read_pickle)
reader("pickle", _write_nvlabs, _read_pickle)


def _safetensors_file(tensors):
    entries, start = {}, 0
    for name, x in tensors.items():
        places = [start, start + x.nbytes]
        entries[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": places}
        start += x.nbytes
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(x.tobytes() for x in tensors.values())


def _write_safetensors(folder):
    tensors = {"a": small(2, 3), "b": small(4), "c": small(0, 2)}
    (folder / "a.safetensors").write_bytes(_safetensors_file(tensors))


def _read_safetensors(folder):
    from lfp_jax.weights import safetensors

    safetensors.is_safetensors(folder / "a.safetensors")
    safetensors.read(folder / "a.safetensors")


reader("safetensors", _write_safetensors, _read_safetensors)


def _write_statistics(folder):
    from lfp_jax.weights import statistics

    statistics.write(folder / "a.npz", mean=small(4), covariance=np.eye(4), count=9)


def _read_statistics(folder):
    from lfp_jax.weights import statistics

    statistics.read(folder / "a.npz")


def _npz(member, header, body, *, how=zipfile.ZIP_DEFLATED, times=1):
    """Write a zip of one array, whose content repeats a part so many times."""
    buffer, head = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, header)
    with (
        zipfile.ZipFile(buffer, "w", how, compresslevel=1) as archive,
        archive.open(member, "w", force_zip64=True) as file,
    ):
        file.write(head.getvalue())
        for _ in range(times):
            file.write(body)
    return buffer.getvalue()


def _swollen_statistics():
    shape = {"descr": "<f8", "fortran_order": False, "shape": (2**14, 2**14)}
    zeros = bytes(2**24)
    objects = shape | {"descr": "|O", "shape": (2,)}
    call = pickle_writer.call(pickle_writer.named("os", "system"), pickle_writer.plain("touch RAN"))
    return {
        "zeros to two gigabytes": {"a.npz": _npz("mu.npy", shape, zeros, times=20)},
        "a promise of 2 GiB": {"a.npz": _npz("mu.npy", shape, b"short")},
        "objects": {"a.npz": _npz("mu.npy", objects, pickle_writer.file(call))},
    }


reader("statistics", _write_statistics, _read_statistics, hostile=_swollen_statistics)


def _write_networks(folder):
    for name, tensors in _network_tensors().items():
        torch = pickle_writer.Torch()
        body = pickle_writer.mapping({k: torch.tensor(v) for k, v in tensors.items()})
        (folder / f"{name}.pth").write_bytes(torch.zip(body))


def _network_tensors():
    convolution = {"weight": small(4, 3, 3, 3), "bias": small(4)}
    norm = {name: small(4) for name in ("weight", "bias", "running_mean", "running_var")}
    inception = {f"a.bn.{name}": x for name, x in norm.items()}
    inception |= {"a.conv.weight": small(4, 3, 3, 3), "a.bn.num_batches_tracked": np.int64(3)}
    return {
        "heads": {"lin0.model.1.weight": small(1, 4, 1, 1)},
        "backbone": {f"features.0.{name}": x for name, x in convolution.items()},
        "inception": inception,
    }


def _read_networks(folder):
    from lfp_jax.weights import backbones

    kernel, vector = np.zeros((3, 3, 3, 4)), np.zeros(4)
    backbones.heads(folder / "heads.pth", widths=[4])
    like = {"0": {"kernel": kernel, "bias": vector}}
    backbones.backbone(folder / "backbone.pth", network="squeeze", like=like)
    norm = {"scale": vector, "bias": vector, "mean": vector, "var": vector}
    backbones.inception(
        folder / "inception.pth", like={"a": {"conv": {"kernel": kernel}, "bn": norm}}
    )


reader("networks of metrics", _write_networks, _read_networks, cost=2)


# --- generators ----------------------------------------------------------------------------------


def filled(make):
    """Fill the arrays that a function would make, without compiling it."""
    import jax

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


def stylegan2():
    """Make a small StyleGAN2."""
    import jax

    from lfp_jax.generators import stylegan2 as networks

    sizes = {"z_dim": 4, "w_dim": 4, "mapping_layers": 2, "mapping_width": 4}
    arch = networks.Architecture(resolution=8, channels=(4, 2), **sizes)
    return filled(lambda: networks.random_generator(jax.random.key(0), arch))


def read_model(name):
    def read(folder):
        from lfp_jax import generators

        generators.load(folder / name)

    return read


def _write_rosinality(folder):
    from lfp_jax import generators

    generators.save_rosinality(folder / "a.pt", stylegan2())


def _write_nvlabs_networks(folder):
    networks = {
        "G_ema": nvlabs_writer.generator(nvlabs_writer.Maker(0)),
        "D": nvlabs_writer.discriminator(nvlabs_writer.Maker(1)),
    }
    content = pickle_writer.file(pickle_writer.mapping(networks), protocol=3)
    (folder / "a.pkl").write_bytes(content)


def _read_nvlabs(folder):
    from lfp_jax import generators

    generators.load(folder / "a.pkl")
    generators.load_discriminator(folder / "a.pkl")


reader("rosinality", _write_rosinality, read_model("a.pt"), cost=10)
reader("nvlabs", _write_nvlabs_networks, _read_nvlabs, cost=20)


def _write_compvis(folder):
    import test_ldm_files

    test_ldm_files._write(folder / "a.ckpt", test_ldm_files._state())
    test_ldm_files._yaml(folder / "a.yaml")


def _laughing():
    """YAML of a few lines whose value, written out, would fill a disk."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return {
        place: {"a.yaml": "\n".join([*lines, text.format(value="*a11")]).encode()}
        for place, text in {
            "unet": "unet: {value}",
            "dims": "unet: {{dims: {value}}}",
            "heads": "unet: {{num_heads: {value}}}",
            "scale": "scale_factor: {value}",
            "schedule": "beta_schedule: {value}",
            "levels": "unet: {{channel_mult: {value}}}",
            "context": "unet: {{context_dim: {value}, use_spatial_transformer: true}}",
            "digits": f"scale_factor: 0x{'f' * 9000}",
        }.items()
    }


_DAMAGED = (".yaml", ".ckpt")
reader(
    "compvis", _write_compvis, read_model("a.ckpt"), hostile=_laughing, damaged=_DAMAGED, cost=20
)


def _write_folder(folder):
    golden = Path(__file__).parent / "golden" / "diffusers"
    shutil.copytree(golden / "vqmodel", folder / "vqvae")
    shutil.copytree(golden / "unet2dcondition", folder / "unet")
    for path in folder.rglob("io.npz"):
        path.unlink()
    scheduler = {
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.001,
        "beta_end": 0.01, "num_train_timesteps": 50, "trained_betas": None, "steps_offset": 1,
        "prediction_type": "epsilon", "clip_sample": False,
    }  # fmt: skip
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def _many_timesteps():
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12}
    return {"many timesteps": {"scheduler/scheduler_config.json": json.dumps(scheduler).encode()}}


reader("diffusers", _write_folder, read_model(""), hostile=_many_timesteps, cost=20)
