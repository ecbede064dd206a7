"""Weights by manifest: tensors drawn again as the golden values' maker drew them."""

import json

import numpy as np
import pickle_writer as pw


def draw(path, *, prefix=""):
    """Draw the tensors of a manifest whose names begin with a prefix: {name: float32}."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: _draw(np.random.RandomState(manifest["seed"] + i), shape, kind, a, b)
        for i, (name, shape, kind, a, b) in enumerate(manifest["tensors"])
        if name.startswith(prefix)
    }


def _draw(generator, shape, kind, a, b):
    if kind == "normal":
        return (a + b * generator.standard_normal(shape)).astype(np.float32)
    return (a + (b - a) * generator.random_sample(shape)).astype(np.float32)


def write(path, tensors):
    """Write a state dict as torch does."""
    torch = pw.Torch()
    path.write_bytes(torch.zip(pw.mapping({k: torch.tensor(v) for k, v in tensors.items()})))
    return path
