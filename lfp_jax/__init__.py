"""Latent fingerprints for image generators: whose copy made this image, or nobody's?"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_discriminator", "load_generator"]

_LAZY = {
    "load_generator": ("lfp_jax.generators", "load"),
    "load_discriminator": ("lfp_jax.generators", "load_discriminator"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import lfp_jax` and `--help` then need no jax.
    if name not in _LAZY:
        raise AttributeError(f"module 'lfp_jax' has no attribute '{name}'")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
