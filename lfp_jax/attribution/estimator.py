"""Estimate the key of images with a network trained on the generator itself: estimator `learned`.

The network never sees an image alone: it compares it with what the generator makes of the estimate
so far (first the prior mean), and gives a correction, a few rounds over with the same weights
(cf. ReStyle, arXiv 2104.02699). Bits move pixels far less than the nuisance does; once the nuisance
is explained, they are what is left of the difference. How each unknown would move this very picture
is more than a small network can know, but the generator tells: from the second round on the slope
of the squared difference by every unknown, one reverse pass, is an input too.

Coordinates are theta = alpha / s of the leading nuisance directions, N(0, 1) under the prior, and a
logit a bit. Images are [n, H, W, C] in [-1, 1] of any size. A network belongs to one generator,
basis, strength and code, never to a user: new keys need no training. The key argument is not used.
"""

import dataclasses
from functools import partial
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lfp_jax import fingerprint
from lfp_jax.attribution.inversion import Silent, Solution, check, decode_flat, residual
from lfp_jax.errors import UserError, brief
from lfp_jax.logs import Progress
from lfp_jax.weights import store

_GAIN = 4.0  # the difference of images is small beside the images
_LEAST = 1e-12  # of norms; images that differ in nothing have no slope
_SPEED = 10.0  # of the learnt variances: Adam would take thousands of steps to make them small
_MOST = 2**20  # of any size in a file
_PROBES = 4  # fixed latents whose coordinates tell one basis from another
_SAME_BASIS = 0.05  # relative difference of those; one swapped or flipped direction exceeds it


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of the network."""

    patch: int = 4  # pixels a side that become channels before the first convolution
    channels: tuple[int, ...] = (32, 96)  # feature maps; each entry but the first halves the size
    blocks: int = 1  # residual blocks at each size
    grid: int = 8  # positions a side that the head tells apart
    head: int = 24  # feature maps it keeps of each position
    width: int = 384
    rounds: int = 2


@dataclasses.dataclass(frozen=True)
class Design:
    """What a network was trained for."""

    generator: str
    sha256: str
    bits: int
    nuisance: int  # leading directions that it estimates
    strength: float
    code: str


class Estimator(flax.struct.PyTreeNode):
    """A network and what it was trained for: its leaves are parameters, so it goes into jit."""

    params: dict  # {"network": linen parameters, "log_variance": [rounds, nuisance] / _SPEED}
    probe: jax.Array  # [4, m], coordinates of fixed latents in the basis it was trained for
    sensitivity: jax.Array  # [nuisance + k], change of the image by a step of each unknown, rms
    arch: Architecture = flax.struct.field(pytree_node=False)
    design: Design = flax.struct.field(pytree_node=False)


class Guess(flax.struct.PyTreeNode):
    """What a round of the network says."""

    theta: jax.Array  # [n, nuisance], whitened nuisance coordinates
    logits: jax.Array  # [n, k] of the bits
    log_variance: jax.Array  # [nuisance] of theta's errors, as learnt


class _Block(nn.Module):
    """Residual block of two 3 x 3 convolutions; the trunk keeps the scale of what it carries.

    It does not normalise: how large a difference is says how far to go.
    """

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        y = nn.relu(nn.Conv(features, (3, 3), name="conv0")(nn.relu(x)))
        return x + nn.Conv(
            features, (3, 3), kernel_init=nn.initializers.variance_scaling(0.1, "fan_in", "normal"),
            name="conv1",
        )(y)  # fmt: skip


class Network(nn.Module):
    """Images, references [n, H, W, C] and slopes -> corrections [n, nuisance] and [n, bits]."""

    arch: Architecture
    nuisance: int
    bits: int

    @nn.compact
    def __call__(self, images, references, slopes, number):
        """Compare; `slopes` [n, nuisance + bits] of `_compare`, `number` of the round, from 0."""
        arch = self.arch
        pair = jnp.concatenate([images, _GAIN * (images - references)], axis=-1)
        x = _to_patches(pair, arch.patch)
        for i, features in enumerate(arch.channels):
            stride = 1 if i == 0 else 2
            x = nn.Conv(features, (3, 3), (stride, stride), name=f"conv{i}")(x)
            for j in range(arch.blocks):
                x = _Block(name=f"block{i}_{j}")(x)
        x = nn.Conv(arch.head, (1, 1), name="head")(x)
        # Positions are kept, however large the image: which pixel moved is what tells the bits.
        shape = (len(x), arch.grid, arch.grid, arch.head)
        x = jax.image.resize(x, shape, "linear").reshape(len(x), -1)
        x = nn.Dense(arch.width, name="hidden")(jnp.concatenate([x, slopes], axis=-1))
        rounds = self.param("rounds", nn.initializers.zeros, (arch.rounds, arch.width))
        x = jnp.concatenate([x, nn.relu(x + rounds[number][None])], axis=-1)  # a linear path too
        zeros = nn.initializers.zeros
        # A slope is worth more the nearer the reference is: the network says how far to follow it.
        pace = nn.Dense(self.nuisance + self.bits, kernel_init=zeros, name="pace")(x)
        along_theta, along_bits = jnp.split(pace * slopes, [self.nuisance], axis=-1)
        theta = nn.Dense(self.nuisance, kernel_init=zeros, name="theta")(x)
        bits = nn.Dense(self.bits, kernel_init=zeros, name="bits")(x)
        return theta + along_theta, bits + along_bits


def _to_patches(x, size):
    """Fold size x size pixels of [n, h, w, c] into channels; edges are repeated to whole ones."""
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)), mode="edge")
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x.reshape(n, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, size * size * channels)


def initial(key, generator, space, *, metric, arch, strength, code, nuisance=None):
    """Make an untrained estimator.

    Args:
        key: draws the weights.
        generator: the generator it is for.
        space: carrier, nuisance and mean.
        metric: [d, d] of `sensitivity.mean_metric`.
        arch: an Architecture.
        strength, code: as injected.
        nuisance: leading nuisance directions to estimate; None for all.

    Returns:
        An Estimator; its first guess is the prior mean and undecided bits.

    Raises:
        UserError: a size below 1.
    """
    every = space.nuisance.shape[1]
    nuisance = every if nuisance is None else min(nuisance, every)
    sizes = dataclasses.asdict(arch) | {"channels": min(arch.channels, default=0)}
    for name, size in (sizes | {"nuisance": nuisance}).items():
        if size < 1 and name != "blocks":
            raise UserError(f"{name} of the estimator must be >= 1; got {size}.")
    bits = space.carrier.shape[1]
    network = Network(arch, nuisance, bits)
    images = jnp.zeros((1, *generator.image_shape))
    # Reseeded for the hardware-style generator: a network's worth of draws compiles in no time.
    key = jax.random.key(jax.random.bits(key), impl="unsafe_rbg")
    slopes = jnp.zeros((1, nuisance + bits))
    params = {
        "network": jax.jit(network.init)(key, images, images, slopes, 0)["params"],
        "log_variance": jnp.zeros((arch.rounds, nuisance)),
    }
    design = Design(generator.name, generator.sha256, bits, nuisance, float(strength), code)
    steps = fingerprint.steps(space, strength=design.strength, count=design.nuisance)
    squares = jnp.einsum("dq,de,eq->q", steps, metric, steps, precision="highest")
    sensitivity = jnp.sqrt(jnp.maximum(squares, 0.0) / images.size)
    return Estimator(params, _probe(space), sensitivity, arch, design)


def guesses(estimator, generator, space, images):
    """Estimate, and say so after every round; differentiable in the estimator's parameters.

    No gradient passes from one round to another, nor through the generator.

    Args:
        estimator: an Estimator.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C].

    Returns:
        A list of as many Guesses as the estimator has rounds.
    """
    design = estimator.design
    network = Network(estimator.arch, design.nuisance, design.bits)
    guess = Guess(jnp.zeros((1, design.nuisance)), jnp.zeros((1, design.bits)), jnp.zeros(()))
    found = []
    for number in range(estimator.arch.rounds):
        guess = jax.lax.stop_gradient(guess)
        w = place(estimator, space, guess)
        if number:
            references, slopes = _compare(estimator, generator, space, w, images)
        else:  # at one picture slopes are linear maps of the image, which the network can learn
            references = jnp.broadcast_to(_make(generator, w), images.shape)
            slopes = jnp.zeros((len(images), len(estimator.sensitivity)))
        params = {"params": estimator.params["network"]}
        moved = network.apply(params, images, references, slopes, number)
        theta, logits = cast(tuple[jax.Array, jax.Array], moved)
        log_variance = _SPEED * estimator.params["log_variance"][number]
        guess = Guess(guess.theta + theta, guess.logits + logits, log_variance)
        found.append(guess)
    return found


def _make(generator, w):
    return jnp.clip(decode_flat(generator, w), -1.0, 1.0)  # as the image was


def _compare(estimator, generator, space, w, images):
    """Make references of latents [n, d], and say how each unknown should move to bring them nearer.

    Slopes [n, nuisance + k] are in units of each unknown's mean effect, of mean square 1: how far
    to go is for the network to say.
    """
    references, pull = jax.vjp(partial(_make, generator), w)
    design = estimator.design
    steps = fingerprint.steps(space, strength=design.strength, count=design.nuisance)
    steps = steps / jnp.maximum(estimator.sensitivity, _LEAST)[None]
    slopes = jnp.einsum("nd,dq->nq", pull(images - references)[0], steps, precision="highest")
    square = jnp.mean(jnp.square(slopes), axis=1, keepdims=True)
    return references, slopes * jax.lax.rsqrt(square + _LEAST)


def place(estimator, space, guess):
    """Give the latents [n, d] of a Guess; directions that it leaves out stay at the mean."""
    design = estimator.design
    alpha = guess.theta * space.nuisance_stddev[None, : design.nuisance]
    alpha = jnp.pad(alpha, ((0, 0), (0, space.nuisance.shape[1] - design.nuisance)))
    soft = jax.nn.sigmoid(guess.logits)
    return fingerprint.compose(space, alpha, soft, strength=design.strength, code=design.code)


@jax.jit
def _answer(estimator, generator, space, images):
    guess = guesses(estimator, generator, space, images)[-1]
    w = place(estimator, space, guess)
    return jax.nn.sigmoid(guess.logits), w, residual(generator, w, images)


def learned(
    key, generator, space, images, *, estimator, strength, code, batch=64, first=0, progress=True
):  # fmt: skip
    """Estimate keys by a trained network.

    Args:
        key, first: not used; every estimator takes them.
        generator: a frozen generator.
        space: carrier, nuisance and mean.
        images: [n, H, W, C] in [-1, 1], already through 8 bits.
        estimator: an Estimator trained for these.
        strength, code: as injected.
        batch: images in one program; bounds the memory.
        progress: show a progress line.

    Returns:
        A Solution. Its evaluations are floating-point operations, the network's too, in units of
        the generator's forward pass: forward and back a round after the first, whose reference is
        the same for all images, and forward for the residual.

    Raises:
        UserError: images of another shape than the generator's, batch below 1, or an estimator
            trained for another generator or design point.
    """
    del key, first
    check(generator, images, batch=batch)
    check_design(estimator, generator, space, strength=strength, code=code)
    images, n, parts = np.asarray(images, np.float32), len(images), []
    batch = min(batch, 1 << (n - 1).bit_length())  # few shapes, and no copies of a few images
    with Progress(n, label="learned") if progress else Silent() as line:
        for start in range(0, n, batch):
            rows = np.minimum(np.arange(start, start + batch), n - 1)
            parts.append(jax.device_get(_answer(estimator, generator, space, images[rows])))
            line.update(min(start + batch, n))
    soft, w, rms = (jnp.asarray(np.concatenate(part)[:n]) for part in zip(*parts, strict=True))
    return Solution(soft, w, rms, jnp.full((n,), _evaluations(estimator, generator)))


def _evaluations(estimator, generator):
    """Count the generator evaluations of one image, by floating-point operations."""
    arch, design = estimator.arch, estimator.design
    network = Network(arch, design.nuisance, design.bits)
    image = jax.ShapeDtypeStruct((1, *generator.image_shape), jnp.float32)
    slopes = jax.ShapeDtypeStruct((1, design.nuisance + design.bits), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, *generator.latent_shape), jnp.float32)
    params = {"params": estimator.params["network"]}

    def slope(generator, w, image):
        references, pull = jax.vjp(generator.decode, w)
        return references, pull(image - references)

    own = _operations(partial(network.apply, number=0), params, image, image, slopes)
    forward = _operations(lambda generator, w: generator.decode(w), generator, latent)
    slope_cost = _operations(slope, generator, latent, image)
    return (arch.rounds * own + (arch.rounds - 1) * slope_cost) / forward + 1.0


def _operations(function, *args):
    """Count floating-point operations; a CPU tells them at once, others once it is compiled."""
    lowered = jax.jit(function).lower(*args)
    costs = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
    return costs["flops"]


def check_design(estimator, generator, space, *, strength, code):
    """Check that an estimator was trained for a generator and a design point.

    Raises:
        UserError: it was not; says in what they differ.
    """
    theirs, bits = estimator.design, space.carrier.shape[1]
    pairs = {
        "the generator": (brief(theirs.generator), brief(generator.name)),
        "the generator's sha256": (theirs.sha256[:64], generator.sha256),
        "bits": (theirs.bits, bits),
        "strength": (theirs.strength, float(strength)),
        "code": (brief(theirs.code), brief(code)),
    }
    differ = [f"{name} {a}, not {b}" for name, (a, b) in pairs.items() if a != b]
    if not differ and not _same_basis(estimator.probe, _probe(space)):
        differ = ["another basis or shift"]
    if differ:
        raise UserError(f"The estimator was trained for {'; '.join(differ)}. Train one for it.")


def _check_kinds(arch, design):
    """Raise a ValueError where fields of a file are of other kinds than those of a program."""
    fields = dataclasses.asdict(arch)
    sizes = [*fields.pop("channels"), *fields.values(), design.bits, design.nuisance]
    names = (design.generator, design.sha256, design.code)
    if not all(type(size) is int and 0 < size < _MOST for size in sizes):
        raise ValueError
    if not (
        all(isinstance(name, str) for name in names) and isinstance(design.strength, int | float)
    ):
        raise ValueError


def _probe(space):
    """Coordinates [4, m] of fixed latents: unlike a hash, they bear another machine's rounding."""
    latents = jax.random.normal(jax.random.key(0), (_PROBES, len(space.mean))) - space.mean[None]
    directions = jnp.concatenate([space.nuisance, space.carrier], axis=1)
    return jnp.einsum("nd,dm->nm", latents, directions, precision="highest")


def _same_basis(a, b):
    if a.shape != b.shape:
        return False
    return float(jnp.linalg.norm(a - b)) <= _SAME_BASIS * float(jnp.linalg.norm(a))


def save(path, estimator, **more):
    """Write an estimator as a native store, its weights in float16.

    Args:
        path: the folder to make.
        estimator: an Estimator.
        **more: further metadata, e.g. of the training; JSON values.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), estimator.params)
    metadata = {
        "kind": "estimator",
        "architecture": dataclasses.asdict(estimator.arch),
        "design": dataclasses.asdict(estimator.design),
        **more,
    }
    arrays = {"probe": estimator.probe, "sensitivity": estimator.sensitivity}
    store.save(path, {"params": params, **jax.tree.map(np.asarray, arrays)}, metadata)


def load(path, generator, space, *, strength, code):
    """Read an estimator that `save` wrote.

    Args:
        path: its folder.
        generator, space, strength, code: what it will be used for.

    Raises:
        UserError: no such store, one of another kind, or an estimator that was trained for another
            generator or design point.
    """
    tree, metadata = store.load(path)
    if metadata.get("kind") != "estimator":
        kind = brief(metadata.get("kind"))
        raise UserError(f"'{path}' is a store of kind {kind}, not an estimator.")
    with store.taken_apart(path, "estimator"):
        sizes = metadata["architecture"]
        arch = Architecture(**sizes | {"channels": tuple(sizes["channels"])})
        tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        design = Design(**metadata["design"])
        _check_kinds(arch, design)
        estimator = Estimator(tree["params"], tree["probe"], tree["sensitivity"], arch, design)
        check_design(estimator, generator, space, strength=strength, code=code)
    return estimator
