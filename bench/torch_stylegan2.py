"""StyleGAN2 written plainly in PyTorch from the equations of arXiv 1912.04958, to race against.

Parameter names are those of `lfp_jax.generators.stylegan2`, so that one loop copies the weights.
Images are NCHW. What a plain implementation may choose is its `form`:

    grouped          styles on the weights, one grouped convolution a batch (what most do)
    scaled           styles on the activations, one convolution for all
    scaled, nhwc     the same with channels last in memory

FIR filters are depthwise convolutions. Nothing is compiled or fused by hand.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from bench import race

FORMS = ("grouped", "scaled", "scaled, nhwc")
_GAIN = math.sqrt(2.0)
_TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])


def _fir(channels, gain):
    taps = torch.outer(_TAPS, _TAPS)
    return (taps * gain / taps.sum()).expand(channels, 1, 4, 4)


def _blur(x, pad, *, gain=1.0, stride=1):
    taps = _fir(x.shape[1], gain)
    return F.conv2d(x, taps, stride=stride, padding=pad, groups=x.shape[1])


def _double(image):
    taps = _fir(image.shape[1], 4.0)
    return F.conv_transpose2d(image, taps, stride=2, padding=1, groups=image.shape[1])


def _lrelu(x, gain=1.0):
    return F.leaky_relu(x, 0.2) * (_GAIN * gain)


def _normal(*shape, stddev=1.0):
    return nn.Parameter(stddev * torch.randn(*shape))


class Linear(nn.Module):
    """Linear layer with equalised learning rate."""

    def __init__(self, inputs, outputs, *, lr=1.0, bias=0.0):
        super().__init__()
        self.kernel = _normal(outputs, inputs, stddev=1.0 / lr)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.lr = lr

    def forward(self, x):
        """Map [n, inputs] to [n, outputs]."""
        scale = self.lr / math.sqrt(x.shape[1])
        return F.linear(x, self.kernel * scale, self.bias * self.lr)


class Mapping(nn.Module):
    """Map z [n, z_dim] to w [n, w_dim]."""

    def __init__(self, arch):
        super().__init__()
        inputs = arch.z_dim
        for i in range(arch.mapping_layers):
            outputs = arch.w_dim if i == arch.mapping_layers - 1 else arch.mapping_width
            setattr(self, f"fc{i}", Linear(inputs, outputs, lr=arch.mapping_lr))
            inputs = outputs

    def forward(self, z):
        """Map z [n, z_dim] to w [n, w_dim]."""
        x = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.children():
            x = _lrelu(layer(x))
        return x


class Modulated(nn.Module):
    """Modulated convolution; 3 x 3 with demodulation, noise and leaky ReLU, or 1 x 1 to colours."""

    def __init__(self, arch, inputs, outputs, *, form, up=False, to_rgb=False):
        super().__init__()
        self.size, self.up, self.to_rgb, self.form = 1 if to_rgb else 3, up, to_rgb, form
        self.affine = Linear(arch.w_dim, inputs, bias=1.0)
        self.kernel = _normal(outputs, inputs, self.size, self.size)
        self.bias = nn.Parameter(torch.zeros(outputs))
        if not to_rgb:
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(self, x, w, noise=None):
        """Convolve x [n, i, h, w] under styles of w [n, w_dim]."""
        style = self.affine(w)
        kernel = self.kernel / math.sqrt(self.kernel[0].numel())
        x = (self._grouped if self.form == "grouped" else self._scaled)(x, style, kernel)
        x = _blur(x, 1, gain=4.0) if self.up else x
        if self.to_rgb:
            return x + self.bias[:, None, None]
        return _lrelu(x + noise * self.noise_strength + self.bias[:, None, None])

    def _grouped(self, x, style, kernel):
        n, inputs, height, width = x.shape
        kernels = kernel[None] * style[:, None, :, None, None]
        if not self.to_rgb:
            kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, n * inputs, height, width)
        if self.up:
            kernels = kernels.transpose(1, 2).flatten(0, 1)
            x = F.conv_transpose2d(x, kernels, stride=2, groups=n)
        else:
            x = F.conv2d(x, kernels.flatten(0, 1), padding=self.size // 2, groups=n)
        return x.reshape(n, -1, *x.shape[2:])

    def _scaled(self, x, style, kernel):
        x = x * style[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
        else:
            x = F.conv2d(x, kernel, padding=self.size // 2)
        if self.to_rgb:
            return x
        power = torch.einsum("oi,ni->no", kernel.square().sum((2, 3)), style.square())
        return x * torch.rsqrt(power + 1e-8)[:, :, None, None]


class SynthesisBlock(nn.Module):
    """One resolution of the synthesis network."""

    def __init__(self, arch, inputs, outputs, *, form):
        super().__init__()
        if inputs:
            self.conv0 = Modulated(arch, inputs, outputs, form=form, up=True)
        self.conv1 = Modulated(arch, outputs, outputs, form=form)
        self.torgb = Modulated(arch, outputs, arch.image_channels, form=form, to_rgb=True)

    def forward(self, x, image, ws, noise):
        """Use up one w and one noise map a convolution; ToRGB looks at the next w."""
        if image is not None:
            x = self.conv0(x, next(ws), next(noise))
        x = self.conv1(x, next(ws), next(noise))
        rgb = self.torgb(x, ws.peek())
        return x, rgb if image is None else _double(image) + rgb


class _Peekable:
    def __init__(self, items):
        self.items, self.place = items, 0

    def __next__(self):
        self.place += 1
        return self.items[self.place - 1]

    def peek(self):
        return self.items[self.place]


class Synthesis(nn.Module):
    """Latents and noise maps -> images."""

    def __init__(self, arch, *, form):
        super().__init__()
        self.arch, self.form = arch, form
        self.const = _normal(arch.channels[0], 4, 4)
        inputs = None
        for i, outputs in enumerate(arch.channels):
            setattr(self, f"b{4 * 2**i}", SynthesisBlock(arch, inputs, outputs, form=form))
            inputs = outputs

    def forward(self, w, noise):
        """Synthesise images [n, C, H, W] of w [n, w_dim] or [n, num_ws, w_dim], noise NCHW."""
        ws = _Peekable(w.unbind(1) if w.ndim == 3 else [w] * self.arch.num_ws)
        x, image, maps = self.const.expand(len(w), -1, -1, -1), None, iter(noise)
        if self.form == "scaled, nhwc":
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self.children():
            x, image = block(x, image, ws, maps)
        return image


class Conv(nn.Module):
    """Convolution of the discriminator, optionally to half the size."""

    def __init__(self, inputs, outputs, *, size=3, down=False, gain=1.0):
        super().__init__()
        self.kernel, self.down, self.gain = _normal(outputs, inputs, size, size), down, gain
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        """Map [n, i, h, w] to [n, o, h, w], or half of it."""
        kernel = self.kernel / math.sqrt(self.kernel[0].numel())
        if self.down:
            x = F.conv2d(_blur(x, 2), kernel, stride=2)
        else:
            x = F.conv2d(x, kernel, padding=kernel.shape[2] // 2)
        return _lrelu(x + self.bias[:, None, None], self.gain)


class Skip(nn.Module):
    """The 1 x 1 shortcut of a residual block, to half the size."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = _normal(outputs, inputs, 1, 1)

    def forward(self, x):
        """Map [n, i, h, w] to [n, o, h / 2, w / 2]."""
        return F.conv2d(_blur(x, 1, stride=2), self.kernel / math.sqrt(self.kernel.shape[1]))


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the size."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv0 = Conv(inputs, inputs)
        self.conv1 = Conv(inputs, outputs, down=True, gain=0.5**0.5)
        self.skip = Skip(inputs, outputs)

    def forward(self, x):
        """Map [n, i, h, w] to [n, o, h / 2, w / 2]."""
        return self.conv1(self.conv0(x)) + self.skip(x) * 0.5**0.5


class Epilogue(nn.Module):
    """Minibatch deviation, convolution and two linear layers at 4 x 4."""

    def __init__(self, arch):
        super().__init__()
        width = arch.channels[0]
        self.group = arch.stddev_group
        self.conv = Conv(width + 1, width)
        self.fc = Linear(16 * width, width)
        self.out = Linear(width, 1)

    def forward(self, x):
        """Map [n, c, 4, 4] to logits [n]."""
        n, _, height, width = x.shape
        groups = x.reshape(min(self.group, n), -1, *x.shape[1:])
        stddev = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        maps = stddev.repeat(len(groups))[:, None, None, None].expand(n, 1, height, width)
        x = self.conv(torch.cat([x, maps], 1)).permute(0, 2, 3, 1).flatten(1)
        return self.out(_lrelu(self.fc(x)))[:, 0]


class Discriminator(nn.Module):
    """Images [n, C, H, W] -> logits [n]."""

    def __init__(self, arch):
        super().__init__()
        self.fromrgb = Conv(arch.image_channels, arch.channels[-1], size=1)
        for i in range(len(arch.channels) - 1, 0, -1):
            block = DiscriminatorBlock(arch.channels[i], arch.channels[i - 1])
            setattr(self, f"b{4 * 2**i}", block)
        self.b4 = Epilogue(arch)

    def forward(self, x):
        """Score images [n, C, H, W]."""
        for layer in self.children():
            x = layer(x)
        return x


def machine():
    """Name the machine, and what PyTorch makes of it, for JSON.

    Beside other work PyTorch's threads, which wait for one another by spinning, lose far more than
    XLA's: figures count only where the load is near zero at the start.
    """
    own = {"torch_threads": torch.get_num_threads(), "torch": torch.__version__}
    return race.machine() | own


def to_torch(array):
    """Turn images or noise maps [n, h, w, c] of numpy or JAX into a tensor [n, c, h, w]."""
    return torch.tensor(array.__array__()).permute(0, 3, 1, 2).contiguous()


def copy_weights(tree, module):
    """Copy linen parameters into a module; every name must be on both sides.

    Raises:
        RuntimeError: a name or shape that does not fit.
    """
    module.load_state_dict(dict(_named(tree, "")), strict=True)
    if getattr(module, "form", "") == "scaled, nhwc":
        module.to(memory_format=torch.channels_last)
    return module


def _named(tree, prefix):
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            yield from _named(leaf, f"{prefix}{name}.")
        else:
            value = torch.tensor(leaf.__array__())
            order = {4: (3, 2, 0, 1), 3: (2, 0, 1), 2: (1, 0)}.get(value.ndim)
            yield f"{prefix}{name}", value.permute(order) if order else value
