"""Measures other methods on a generator's pictures, in the rows of the project's own tables.

    pip install .[bench]
    python -m bench.baselines --workdir runs/stylegan2_grid
    python -m bench.baselines --methods shallow --psnr 40 --images 256 --workdir runs/shallow

Each row is a cell in the folder of a grid, whose report then has it in its tables and plots
(`--mode=report`); its `estimator` is the method.

Methods:
  shallow          Kim et al. 2021: a pixel key a user and its linear classifier (lfp_jax.shallow),
                   trained on pictures of the generator. It has no bits: `word_accuracy` is the
                   share of pictures on which the own key's classifier alone says yes, and
                   `right_user_first` is among the users.
  blind-watermark  DWT-DCT-SVD of the package of that name, a key of bits a user. A block of 4 x 4
                   wavelet coefficients holds a bit, and one must stay free: 63 bits at 64 x 64.
                   `right_user_first` is among random keys.

Every method marks at the same PSNR against the plain picture, by a strength found by bisection.
Pictures go through 8-bit PNG, then each attack, then the detector, which is not told the attack.
`fd` is that of fingerprinted pictures without attack to the held-out ones.
"""

import argparse
import warnings

import jax
import numpy as np

from bench import command
from bench.rows import draw_bits, line, mean, rate, row
from lfp_jax import attacks, basis, design, images, shallow
from lfp_jax.cells import Folder
from lfp_jax.errors import UserError, choose
from lfp_jax.metrics import accuracy, distances, features, perceptual

ATTACKS = (
    "none", "paper:noise", "paper:blur", "paper:jpeg", "paper:combination",
    "paper-history:crop", "paper-history:blur",
)  # fmt: skip
_TUNING = 32  # pictures behind a strength
_HALVINGS = 12
_DRAWS = 100  # bootstrap draws of a distance
_MOST_BITS = 64
# Everything random comes from one of these folds of the seed.
_IMAGES, _TRAINING, _KEYS, _ATTACK, _DECOYS, _QUALITY, _BOOTSTRAP = range(7)


class Shallow:
    """Pixel keys; see `lfp_jax.shallow`."""

    least, most = 1e-2, 1e3  # strengths to look between

    def __init__(self, fold, generator, options):
        """Train keys on plain pictures."""
        latents = basis.sample(fold[_TRAINING], generator, options.training)
        plain = images.png_round_trip(design.decode(generator, latents))
        self.keys = shallow.train(
            fold[_KEYS], plain, users=options.users, epochs=options.epochs, steps=options.steps
        )
        self.settings = {
            "bits": None, "training_images": options.training, "epochs": options.epochs,
            "steps": options.steps,
        }  # fmt: skip

    def mark(self, plain, user, strength):
        """Fingerprint pictures."""
        return np.asarray(shallow.mark(self.keys, plain, user, strength=strength))

    def measure(self, seen, user, strength, unmarked):
        """Ask all classifiers; an answer a user is what a bit is elsewhere."""
        del strength
        silent = np.asarray(shallow.scores(self.keys, unmarked)[0]) <= 0.0
        raw, standard = map(np.asarray, shallow.scores(self.keys, seen))
        users = np.arange(raw.shape[1])[None]
        truth, best = users == user[:, None], users == standard.argmax(axis=1)[:, None]
        note = {"users": raw.shape[1]}
        return {
            "word_accuracy": rate(accuracy.word_accuracy(raw > 0.0, truth))
            | {"note": "no bits: the own key's classifier alone says yes"} | note,
            "right_user_first": rate(accuracy.word_accuracy(best, truth)) | note,
            "plain_not_accused": rate(accuracy.word_accuracy(silent, np.ones(len(users[0]), bool))),
        }  # fmt: skip


class BlindWatermark:
    """The package `blind-watermark`, on RGB pictures."""

    least, most = 1e-2, 1e1  # 1 is the package's own

    def __init__(self, fold, generator, options):
        """Draw a key of bits a user."""
        try:
            import blind_watermark
            from blind_watermark import bwm_core
        except ImportError:
            raise UserError(
                "blind-watermark is not installed: pip install .[bench], or --methods shallow."
            ) from None
        blind_watermark.bw_notes.close()  # no greeting
        self._make, self._decide = blind_watermark.WaterMark, bwm_core.one_dim_kmeans
        height, width, channels = generator.image_shape
        self.bits = min(_MOST_BITS, (height // 8) * (width // 8) - 1)
        if channels != 3 or self.bits < 1:
            raise UserError(
                f"blind-watermark needs RGB of 16 x 16 or more; got {generator.image_shape}."
            )
        self.keys = draw_bits(fold[_KEYS], options.users, self.bits)
        self._decoys = draw_bits(fold[_DECOYS], options.decoys, self.bits)
        self.settings = {"bits": self.bits, "version": blind_watermark.__version__}

    def _tool(self, strength):
        tool = self._make()
        core = tool.bwm_core
        core.d1, core.d2 = strength * core.d1, strength * core.d2
        return tool

    def mark(self, plain, user, strength):
        """Fingerprint pictures."""
        made = []
        for picture, bits in zip(plain, self.keys[user], strict=True):
            tool = self._tool(strength)
            tool.read_img(img=_to_bgr(picture))
            tool.read_wm(bits, mode="bit")
            made.append(tool.embed()[..., ::-1] / 127.5 - 1.0)
        return np.stack(made)

    def measure(self, seen, user, strength, unmarked):
        """Read bits as the package decides on them, and the soft ones that it decides by."""
        del unmarked
        hard, soft = [], []
        for picture in map(_to_bgr, seen):
            tool = self._tool(strength)
            tool.wm_size = self.bits
            found = tool.bwm_core.extract(picture, self.bits)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                # The mean of no block, where all say the same.
                warnings.simplefilter("ignore", RuntimeWarning)
                hard.append(tool.extract_decrypt(self._decide(found)))
            soft.append(tool.extract_decrypt(found))
        truth, hard = self.keys[user], np.stack(hard)
        first = accuracy.first_among(np.stack(soft) - 0.5, truth, self._decoys)
        return {
            "bit_accuracy": rate(accuracy.bit_accuracy(hard, truth)),
            "word_accuracy": rate(accuracy.word_accuracy(hard, truth)),
            "right_user_first": rate(first) | {"decoys": len(self._decoys)},
        }


METHODS = {"shallow": Shallow, "blind-watermark": BlindWatermark}


def measure(options):
    """Measure every method under every attack; yield a row each."""
    methods = {name: choose(name, METHODS, "method") for name in options.methods}
    found = {name: attacks.find(name) for name in options.attacks}
    key = jax.random.key(options.seed)
    fold = [jax.random.fold_in(key, i) for i in range(7)]
    generator = design.load_generator(options.generator)
    user = np.arange(options.images) % options.users
    latents = basis.sample(fold[_IMAGES], generator, options.images)
    plain = images.png_round_trip(design.decode(generator, latents))
    judged = _Distances(fold, generator, options.fd_images) if options.fd_images else None
    for name, make in methods.items():
        method = make(fold, generator, options)
        strength = _strength(method, plain[:_TUNING], user[:_TUNING], options.psnr)
        made = images.png_round_trip(method.mark(plain, user, strength))
        common = {
            "psnr": mean(jax.vmap(perceptual.psnr)(made, plain), unit="dB"),
            "ssim": mean(jax.vmap(perceptual.ssim)(made, plain)),
        }
        if judged is not None:
            common |= judged.measure(method, strength, options.users)
        settings = {
            "generator": generator.name, "generator_sha256": generator.sha256,
            "images": options.images, "users": options.users, "seed": options.seed,
            "psnr": options.psnr, "estimator": name,
        } | method.settings  # fmt: skip
        for label, attack in found.items():
            seen, unmarked = (attacks.apply(fold[_ATTACK], x, attack) for x in (made, plain))
            metrics = method.measure(seen, user, strength, unmarked) | common
            changes = ("estimator", "attack", "psnr")
            own = settings | {"attack": label}
            yield row(own, metrics, changes=changes, strength=strength)


def _strength(method, plain, user, psnr):
    """Find the strength at which the mean PSNR of 8-bit pictures is as asked, by bisection."""
    low, high = np.log([method.least, method.most])
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        made = images.png_round_trip(method.mark(plain, user, float(np.exp(middle))))
        if np.mean(jax.vmap(perceptual.psnr)(made, plain)) > psnr:
            low = middle
        else:
            high = middle
    return float(np.exp(0.5 * (low + high)))


class _Distances:
    """Fréchet distances of fresh pictures, plain and fingerprinted, to the held-out ones."""

    def __init__(self, fold, generator, n):
        latents = basis.sample(fold[_QUALITY], generator, n)
        self._plain = images.to_uint8(design.decode(generator, latents))
        self._key, self._classifier = fold[_BOOTSTRAP], features.load_classifier()
        self._of_plain = self._distance(self._plain)

    def _distance(self, u8):
        found = features.features_in_batches(self._classifier, u8, batch=64)
        distance = distances.frechet_interval(
            found, features.load_reference(), key=self._key, draws=_DRAWS
        )
        value = {"value": distance.value, "low": distance.low, "high": distance.high}
        return value | {
            "features": features.NAME, "reference": "held-out pictures", "images": len(u8)
        }  # fmt: skip

    def measure(self, method, strength, users):
        """Give the distances `fd` and `fd_plain`."""
        user = np.arange(len(self._plain)) % users
        made = method.mark(images.from_uint8(self._plain), user, strength)
        return {"fd": self._distance(images.to_uint8(made)), "fd_plain": self._of_plain}


def _to_bgr(picture):
    """Turn an image in [-1, 1] to what OpenCV calls one."""
    return np.ascontiguousarray(images.to_uint8(picture)[..., ::-1])


def parse(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), help="SUITE:NAME ...")
    parser.add_argument("--generator", default="stylegan2-demo")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--psnr", type=float, default=33.5, help="dB, of all methods")
    parser.add_argument("--training", type=int, default=1_024, help="pictures, of shallow")
    parser.add_argument("--epochs", type=int, default=10, help="of shallow, a key")
    parser.add_argument("--steps", type=int, default=120, help="of shallow, an epoch")
    parser.add_argument("--decoys", type=int, default=100_000, help="random keys")
    parser.add_argument("--fd-images", type=int, default=5_000, help="0: no distance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", default="runs/baselines", help="of a grid, or a new folder")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the benchmark."""
    options = parse(argv)
    folder = Folder(options.workdir)
    for found in measure(options):
        folder.write(found)
        print(line(found), flush=True)


if __name__ == "__main__":
    command.run(main)
