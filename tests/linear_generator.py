"""A generator whose images are linear in its latents, for tests against exact answers."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class Linear(flax.struct.PyTreeNode):
    """Latents [d] ~ N(0, S^T S), images [4, 4, 3] = J w, well within [-1, 1]."""

    spread: jax.Array  # S [d, d]
    jacobian: jax.Array  # J [48, d]
    name: str = flax.struct.field(pytree_node=False, default="linear")
    sha256: str = flax.struct.field(pytree_node=False, default="0" * 64)
    image_shape: tuple = flax.struct.field(pytree_node=False, default=(4, 4, 3))

    @property
    def latent_shape(self):
        """Give (d,)."""
        return (len(self.spread),)

    def sample(self, key, n, *, start=0):
        """Draw latents [n, d]."""
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(n))
        drawn = jax.vmap(lambda k: jax.random.normal(k, self.latent_shape))(keys)
        return jnp.einsum("nd,de->ne", drawn, self.spread, precision="highest")

    def decode(self, w):
        """Make images [n, 4, 4, 3]."""
        rows = jnp.einsum("pd,nd->np", self.jacobian, w, precision="highest")
        return rows.reshape(-1, *self.image_shape)


def make(*, d=16, seed=0):
    """Make one whose directions differ a hundredfold in how far they move the image."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spread = (rng.normal(size=(d, d)) * np.geomspace(1.0, 0.2, d)).astype(np.float32)
    jacobian = (rng.normal(size=(48, d)) * np.geomspace(0.1, 0.001, d)) @ mixing
    return Linear(jnp.asarray(spread), jnp.asarray(0.3 * jacobian, jnp.float32))
