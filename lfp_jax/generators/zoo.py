"""Generators by name."""

import os

from lfp_jax.errors import UserError, did_you_mean

_ASSETS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets")

# What the weights of each source format may be used for, as far as the format tells.
LICENCES = {
    "rosinality": "code MIT; weights as their author states, FFHQ-trained: CC BY-NC-SA 4.0 data",
    "nvlabs": "NVIDIA Source Code License, non-commercial",
    "compvis": "code MIT; weights as their author states, Stable Diffusion: CreativeML OpenRAIL-M",
    "diffusers": "as the model card states",
}

# Trained on the same faces, whose held-out pictures are the reference of their distances.
BUNDLED = {name: os.path.join(_ASSETS, name) for name in ("stylegan2-demo", "ldm-demo")}


def estimator(name, attacks):
    """Give the path of the bundled network that reads keys from a generator's images, or None.

    Args:
        name: of the generator.
        attacks: "none", or "attacks" where they stood in its training.
    """
    path = os.path.join(_ASSETS, "estimators", name, attacks)
    return path if os.path.isdir(path) else None


def basis(name):
    """Give the path of the bundled directions of a generator's latents, or None.

    Args:
        name: of the generator.
    """
    path = os.path.join(_ASSETS, "bases", name)
    return path if os.path.isdir(path) else None


def resolve(source):
    """Turn a zoo name or a path into an existing path.

    Raises:
        UserError: neither a name in the zoo nor an existing path.
    """
    source = os.fspath(source)
    if source in BUNDLED:
        return BUNDLED[source]
    if os.path.exists(source):
        return source
    if os.sep in source or "." in source:
        raise UserError(f"No such file or folder: '{source}'.")
    raise UserError(did_you_mean(source, list(BUNDLED), "generator"))
