"""Generators of known geometry with random weights, by name: for tests, timing and rehearsals."""

import hashlib

import jax

from lfp_jax.generators import assemble, stylegan2

_TINY_LDM = {
    "first_stage": {
        "embed_dim": 3, "n_embed": 64, "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3,
            "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
            "attn_type": "none",
        },
    },
    "unet": {
        "image_size": 4, "in_channels": 3, "out_channels": 3, "model_channels": 32,
        "num_heads": 2, "attention_resolutions": [1], "num_res_blocks": 1, "channel_mult": [1],
    },
}  # fmt: skip

# Latent diffusion on FFHQ at 256 x 256 (arXiv 2112.10752, table 12): VQ of factor 4, its UNet.
_LDM_FFHQ = {
    "first_stage": {
        "embed_dim": 3, "n_embed": 8192, "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3,
            "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
    "unet": {
        "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224,
        "attention_resolutions": [8, 4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 32,
    },
}  # fmt: skip

# The first stage of Stable Diffusion 1 and 2: KL of factor 8.
_KL_F8 = {
    "embed_dim": 4, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 512, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
    },
}  # fmt: skip

LATENT_DIFFUSION = {
    "ldm-tiny": _TINY_LDM,
    "ldm-ffhq-untrained": _LDM_FFHQ,
    "kl-f8-untrained": _KL_F8,
}
NAMES = ("stylegan2-tiny", *LATENT_DIFFUSION)


def make(name):
    """Make a generator with random weights, which are the same each time.

    Args:
        name: one of `NAMES`.

    Returns:
        A frozen generator; its hash is that of its name.
    """
    key = jax.random.key(0)
    if name in LATENT_DIFFUSION:
        made = assemble.random_latent_diffusion(key, LATENT_DIFFUSION[name]).replace(name=name)
    else:
        arch = stylegan2.Architecture(
            resolution=32, channels=(16, 16, 8, 8), z_dim=32, w_dim=32, mapping_layers=2,
            mapping_width=32,
        )  # fmt: skip
        made = stylegan2.random_generator(key, arch, name=name)
    return made.replace(sha256=hashlib.sha256(name.encode()).hexdigest())
