"""The published attribution written plainly in PyTorch, to race against (arXiv 2304.09752, eq. 5).

One image and one start at a time: Adam on nuisance coordinates and logits of the key, learning rate
0.2 exp(-0.001 i). Its perceptual loss is replaced by this project's Laplacian pyramid, and the
features of the image are computed once, where the published code does it in every step.
"""

import math

import torch
import torch.nn.functional as F

from lfp_jax.fingerprint import CODES

_BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
_EVEN, _ODD = torch.tensor([1.0, 6.0, 1.0]) / 8.0, torch.tensor([1.0, 1.0]) / 2.0


def pyramid(image, *, levels=4):
    """Give the weighted levels of the Laplacian pyramid of images [n, C, H, W], finest first."""
    parts = []
    for _ in range(levels - 1):
        coarse = _halve(image)
        parts.append(image - _double(coarse)[..., : image.shape[2], : image.shape[3]])
        image = coarse
    parts.append(image)
    return [part * math.sqrt(2.0**i / part[0].numel()) for i, part in enumerate(parts)]


def _filter(x, taps, *, stride=1):
    """Filter rows, then columns, where the taps fit."""
    n = x.shape[1]
    x = F.conv2d(x, taps.reshape(1, 1, -1, 1).expand(n, 1, -1, 1), stride=(stride, 1), groups=n)
    return F.conv2d(x, taps.reshape(1, 1, 1, -1).expand(n, 1, 1, -1), stride=(1, stride), groups=n)


def _halve(image):
    return _filter(F.pad(image, (2, 2, 2, 2), mode="replicate"), _BINOMIAL, stride=2)


def _double(image):
    """Give the zero-stuffed image blurred with gain 4, borders repeated before the stuffing."""
    n = image.shape[1]
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    taps = 2.0 * _BINOMIAL
    kernel = torch.outer(taps, taps).expand(n, 1, 5, 5)
    wide = F.conv_transpose2d(padded, kernel, stride=2, groups=n)
    return wide[..., 4 : 4 + 2 * image.shape[2], 4 : 4 + 2 * image.shape[3]]


class Descent:
    """One start on one image."""

    def __init__(
        self, synthesis, noise, space, image, *, strength, code, learning_rate, decay, penalty
    ):
        """Draw a start.

        Args:
            synthesis: network [n, w_dim] and noise maps -> images; its weights are frozen.
            noise: constant maps.
            space: dict of tensors "mean" [d], "carrier" [d, k], "nuisance" [d, m],
                "nuisance_stddev" [m].
            image: [1, C, H, W] in [-1, 1].
            strength, code: as injected.
            learning_rate, decay, penalty: as the published 0.2, 0.001, 0.1.
        """
        self.synthesis, self.noise, self.space = synthesis, noise, space
        self.strength, self.offset, self.penalty = strength, CODES[code], penalty
        self.target = pyramid(image)
        stddev = space["nuisance_stddev"]
        self.alpha = (stddev * (2.0 * torch.rand(len(stddev)) - 1.0)).requires_grad_()
        self.logits = torch.zeros(space["carrier"].shape[1], requires_grad=True)
        self.adam = torch.optim.Adam([self.alpha, self.logits], lr=learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda i: math.exp(-decay * i))

    def latent(self):
        """Compute the latent [d] here."""
        code = torch.sigmoid(self.logits) - self.offset
        w = self.space["mean"] + self.space["nuisance"] @ self.alpha
        return w + self.strength * (self.space["carrier"] @ code)

    def loss(self):
        """Compute the loss [] here."""
        made = pyramid(self.synthesis(self.latent()[None], self.noise))
        distance = sum((a - b).square().sum() for a, b in zip(made, self.target, strict=True))
        outside = F.relu(self.alpha.abs() - 3.0 * self.space["nuisance_stddev"]).sum()
        return distance + self.penalty * outside

    def step(self):
        """Make one step of Adam."""
        self.adam.zero_grad()
        self.loss().backward()
        self.adam.step()
        self.schedule.step()
