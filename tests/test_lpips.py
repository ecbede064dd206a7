"""LPIPS against recorded values, against plain numpy, and as a loss; its files read strictly."""

from pathlib import Path

import jax
import jax.numpy as jnp
import manifest
import numpy as np
import pytest

from lfp_jax.errors import UserError
from lfp_jax.metrics import lpips, perceptual
from lfp_jax.weights import pickles

GOLDEN = Path(__file__).parent / "golden" / "lpips"
# torchvision's AlexNet, written out once more: (index, width, kernel, stride, padding, pool before)
ALEX = [
    (0, 64, 11, 4, 2, False),
    (3, 192, 5, 1, 2, True),
    (6, 384, 3, 1, 1, True),
    (8, 256, 3, 1, 1, False),
    (10, 256, 3, 1, 1, False),
]

pytestmark = pytest.mark.usefixtures("quick_compilation")
layer_distances = jax.vmap(lpips.layer_distances, in_axes=(None, 0, 0))


def _alex_tensors():
    rng, tensors, inputs = np.random.default_rng(5), {}, 3
    for index, width, kernel, *_ in ALEX:
        shape = (width, inputs, kernel, kernel)
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        tensors[f"features.{index}.weight"] = rng.normal(0, scale, shape).astype(np.float32)
        tensors[f"features.{index}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
        inputs = width
    heads = {
        f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, layer[1], 1, 1)).astype(np.float32)
        for i, layer in enumerate(ALEX)
    }
    return tensors, heads


@pytest.fixture(scope="module")
def squeeze():
    """The network of the recorded values."""
    folder = GOLDEN / "squeeze"
    files = {"backbone": folder / "backbone_fp16.pth", "heads": folder / "lin.pth"}
    return lpips.load("squeeze", **files)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """The network of the recorded values."""
    tensors = manifest.draw(GOLDEN / "vgg" / "backbone_manifest.json")
    path = manifest.write(tmp_path_factory.mktemp("vgg") / "vgg16.pth", tensors)
    return lpips.load("vgg", backbone=path, heads=GOLDEN / "vgg" / "lin.pth")


@pytest.fixture(scope="module")
def pictures():
    """The recorded images, channels last, 0..1."""
    with np.load(GOLDEN / "squeeze" / "io.npz") as file:
        return {k: file[k].transpose(0, 2, 3, 1) for k in file.files if k.startswith("img")}


@pytest.mark.parametrize("network", ["squeeze", "vgg"])
def test_golden(network, pictures, request):
    model = request.getfixturevalue(network)
    with np.load(GOLDEN / network / "io.npz") as file:
        expected = dict(file)
    x, y = pictures["img0_01"], pictures["img1_01"]
    found = layer_distances(model, 2 * x - 1, 2 * y - 1)
    np.testing.assert_allclose(found, expected["per_layer_normalize"], rtol=1e-4)
    np.testing.assert_allclose(found.sum(1), expected["dist_normalize"].ravel(), rtol=1e-4)
    np.testing.assert_allclose(layer_distances(model, x, y), expected["per_layer"], rtol=1e-4)


@pytest.mark.parametrize("network", ["squeeze", "vgg"])
def test_golden_odd_sizes(network, pictures, request):
    model = request.getfixturevalue(network)
    x, y = (2 * pictures[f"img{i}_odd_01"] - 1 for i in "01")
    with np.load(GOLDEN / network / "io.npz") as file:
        expected = file["dist_odd_normalize"].ravel()
    np.testing.assert_allclose(layer_distances(model, x, y).sum(1), expected, rtol=1e-4)


def test_alex_is_its_definition(tmp_path):
    tensors, heads = _alex_tensors()
    model = lpips.load(
        "alex",
        backbone=manifest.write(tmp_path / "a", tensors),
        heads=manifest.write(tmp_path / "h", heads),
    )
    x, y = np.random.default_rng(6).uniform(-1, 1, (2, 33, 41, 3)).astype(np.float32)
    found = lpips.layer_distances(model, x, y)
    np.testing.assert_allclose(found, _slow_alex(tensors, heads, x, y), rtol=1e-5)
    np.testing.assert_allclose(lpips.distance(model, x, y), found.sum(), rtol=1e-6)


def _slow_alex(tensors, heads, *images):
    """The layers' distances in float64, channels first, from the definition."""
    shift, scale = np.array([-0.03, -0.088, -0.188]), np.array([0.458, 0.448, 0.45])
    sides = [((x.astype(np.float64) - shift) / scale).transpose(2, 0, 1) for x in images]
    values = []
    for i, (index, _, kernel, stride, padding, pool) in enumerate(ALEX):
        if pool:
            sides = [_windows(x, 3, 2).max(axis=(-2, -1)) for x in sides]
        pad = [(0, 0), (padding, padding), (padding, padding)]
        weight, bias = tensors[f"features.{index}.weight"], tensors[f"features.{index}.bias"]
        sides = [
            np.einsum("oikl,ihwkl->ohw", weight, _windows(np.pad(x, pad), kernel, stride))
            + bias[:, None, None]
            for x in sides
        ]
        sides = [np.maximum(x, 0.0) for x in sides]
        a, b = (x / (np.sqrt((x**2).sum(axis=0, keepdims=True)) + 1e-10) for x in sides)
        head = heads[f"lin{i}.model.1.weight"].ravel()
        values.append(np.einsum("c,chw->hw", head, (a - b) ** 2).mean())
    return values


def _windows(x, size, stride):
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return windows[:, ::stride, ::stride]


def test_as_a_loss_it_is_a_sum_of_squares(squeeze, pictures):
    loss = perceptual.loss("lpips", network=lpips.features, params=squeeze)
    x, y = (jnp.asarray(2 * pictures[f"img{i}_01"][0, :24, :20] - 1) for i in "01")

    @jax.jit
    def value_and_gradient(loss, target, image):
        return jax.value_and_grad(loss.distance, argnums=1)(loss.prepare(target), image)

    value, gradient = value_and_gradient(loss, x, y)
    np.testing.assert_allclose(value, lpips.distance(squeeze, x, y), rtol=1e-5)
    assert jnp.abs(gradient).max() > 1e-5
    value, gradient = value_and_gradient(loss, x, x)
    np.testing.assert_allclose(value, 0.0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_places_where_all_channels_are_off_have_a_gradient():
    kernel = np.zeros((1, 1, 3, 2), np.float32)  # ReLU leaves nothing

    def norm_of(x):
        return lpips._norm(jax.nn.relu(jnp.einsum("hwic,nhwi->nhwc", kernel, x))).sum()

    gradient = jax.grad(norm_of)(jnp.ones((1, 4, 4, 3)))
    np.testing.assert_array_equal(gradient, 0.0)


def test_grey_is_repeated_and_sides_may_change(squeeze, pictures):
    x, y = (2 * pictures[f"img{i}_01"][0, :24, :20] - 1 for i in "01")
    grey = lpips.distance(squeeze, x[..., :1], y[..., :1])
    colour = lpips.distance(squeeze, *(np.repeat(side[..., :1], 3, -1) for side in (x, y)))
    np.testing.assert_allclose(grey, colour, rtol=1e-5)
    np.testing.assert_allclose(
        lpips.distance(squeeze, y, x), lpips.distance(squeeze, x, y), rtol=1e-5
    )


def test_an_image_too_small_or_of_odd_shape_is_refused(squeeze):
    small = np.zeros((16, 40, 3), np.float32)
    with pytest.raises(UserError, match=r"\(squeeze\) needs .* sides of 17 .* got \[16, 40, 3\]"):
        lpips.distance(squeeze, small, small)
    with pytest.raises(UserError, match=r"two images alike; got \[16, 40, 3\] and \[40, 40, 3\]"):
        lpips.distance(squeeze, small, np.zeros((40, 40, 3), np.float32))
    with pytest.raises(UserError, match=r"1 or 3\] .*; got \[40, 40, 4\]"):
        lpips.features(squeeze, np.zeros((1, 40, 40, 4), np.float32))
    with pytest.raises(UserError, match="Unknown LPIPS network 'vg'. Did you mean 'vgg'"):
        lpips.load("vg")


@pytest.mark.parametrize("network", lpips.NAMES)
def test_the_smallest_images_reach_the_last_layer(network):
    def layers(side):
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        net = lpips.Backbone(network)
        return jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x)[0], image)

    smallest = lpips._SMALLEST[network]
    assert min(min(layer.shape) for layer in layers(smallest)) == 1
    try:
        below = min(min(layer.shape) for layer in layers(smallest - 1))
    except (ValueError, ZeroDivisionError):
        below = 0
    assert below == 0


def _damaged(what):
    tensors = dict(pickles.read(GOLDEN / "squeeze" / "backbone_fp16.pth"))
    name = "features.9.squeeze.bias"
    if what == "missing":
        del tensors[name]
    elif what == "unexpected":
        tensors["features.99.weight"] = np.zeros(3, np.float32)
    elif what == "wrong shape":
        tensors[name] = np.zeros(47, np.float32)
    elif what == "half a classifier":
        tensors["classifier.1.weight"] = np.zeros((1000, 512, 1, 1), np.float16)
    return tensors


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "lacks tensors that a squeeze backbone needs: 'features.9.squeeze.bias'"),
        ("unexpected", "has tensors with no place in a squeeze backbone: 'features.99.weight'"),
        ("wrong shape", r"'features.9.squeeze.bias' has the shape \[47\]; needed: \[48\]"),
        ("half a classifier", "lacks .*'classifier.1.bias'"),
    ],
)
def test_a_backbone_is_read_strictly(what, message, tmp_path):
    path = manifest.write(tmp_path / "net.pth", _damaged(what))
    with pytest.raises(UserError, match=message):
        lpips.load("squeeze", backbone=path, heads=GOLDEN / "squeeze" / "lin.pth")


def test_torchvision_classifiers_are_passed_over(tmp_path, squeeze):
    tensors = _damaged("half a classifier") | {"classifier.1.bias": np.zeros(1000, np.float16)}
    path = manifest.write(tmp_path / "net.pth", tensors)
    model = lpips.load("squeeze", backbone=path, heads=GOLDEN / "squeeze" / "lin.pth")
    jax.tree.map(np.testing.assert_array_equal, model, squeeze)


def test_heads_are_read_strictly():
    backbone = GOLDEN / "squeeze" / "backbone_fp16.pth"
    with pytest.raises(UserError, match="lacks .* LPIPS heads needs: 'lin5.model.1.weight'"):
        lpips.load("squeeze", backbone=backbone, heads=GOLDEN / "vgg" / "lin.pth")
    with pytest.raises(UserError, match="lacks .*'lin0.model.1.weight'"):
        lpips.load("squeeze", backbone=backbone, heads=backbone)


def test_weights_that_are_not_here_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LFP_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"put https://.*vgg16-397923af.pth at '.*vgg16"):
        lpips.load("vgg")
