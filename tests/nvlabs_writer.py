"""Writes NVlabs' StyleGAN2 networks of any size, from their layer structure, without torch."""

import numpy as np
import pickle_writer as write


def square(taps, gain):
    taps = np.array(taps, np.float32)
    return np.outer(taps, taps) / taps.sum() ** 2 * gain


FILTER = square((1, 3, 3, 1), 1)


class Maker:
    """Random tensors, remembered by name."""

    def __init__(self, seed):
        self._random = np.random.default_rng(seed)
        self.made = {}

    def __call__(self, name, *shape):
        self.made[name] = self._random.standard_normal(shape).astype(np.float32)
        return self.made[name]

    def linear(self, name, inputs, outputs, **attributes):
        tensors = {
            "weight": self(f"{name}.weight", outputs, inputs),
            "bias": self(f"{name}.bias", outputs),
        }
        return write.nvlabs_module("FullyConnectedLayer", tensors=tensors, **attributes)

    def conv(self, name, inputs, outputs, size, *, bias=True, **attributes):
        tensors = {
            "weight": self(f"{name}.weight", outputs, inputs, size, size),
            "resample_filter": FILTER,
        }
        if bias:
            tensors["bias"] = self(f"{name}.bias", outputs)
        return write.nvlabs_module("Conv2dLayer", tensors=tensors, **attributes)

    def mapping(self, *, z_dim, label_dim, embed, width, out, layers, w_avg):
        modules = {"embed": self.linear("mapping.embed", label_dim, embed, bias_gain=1)}
        sizes = [z_dim + embed, *[width] * (layers - 1), out]
        for i in range(layers):
            name = f"fc{i}"
            made = self.linear(f"mapping.{name}", sizes[i], sizes[i + 1], bias_gain=0.02)
            modules[name] = made
        tensors = {"w_avg": self("w_avg", out)} if w_avg else {}
        return write.nvlabs_module("MappingNetwork", tensors=tensors, modules=modules)

    def layer(self, name, side, inputs, outputs, w_dim):
        tensors = {
            "weight": self(f"{name}.weight", outputs, inputs, 3, 3),
            "bias": self(f"{name}.bias", outputs),
            "noise_strength": self(f"{name}.noise_strength"),
            "noise_const": self(f"{name}.noise_const", side, side),
            "resample_filter": FILTER,
        }
        modules = {"affine": self.linear(f"{name}.affine", w_dim, inputs)}
        return write.nvlabs_module(
            "SynthesisLayer", tensors=tensors, modules=modules, conv_clamp=128, activation="lrelu"
        )

    def torgb(self, name, inputs, w_dim):
        tensors = {
            "weight": self(f"{name}.weight", 1, inputs, 1, 1),
            "bias": self(f"{name}.bias", 1),
        }
        modules = {"affine": self.linear(f"{name}.affine", w_dim, inputs)}
        return write.nvlabs_module("ToRGBLayer", tensors=tensors, modules=modules)


def generator(make, *, architecture="skip", channels=(8, 6, 4)):
    w_dim, blocks = 10, {}
    for i, outputs in enumerate(channels):
        side, modules = 4 * 2**i, {}
        name = f"synthesis.b{side}"
        tensors = {"resample_filter": FILTER}
        if i == 0:
            tensors["const"] = make(f"{name}.const", outputs, 4, 4)
        else:
            modules["conv0"] = make.layer(f"{name}.conv0", side, channels[i - 1], outputs, w_dim)
        modules["conv1"] = make.layer(f"{name}.conv1", side, outputs, outputs, w_dim)
        modules["torgb"] = make.torgb(f"{name}.torgb", outputs, w_dim)
        blocks[f"b{side}"] = write.nvlabs_module(
            "SynthesisBlock", tensors=tensors, modules=modules, architecture=architecture
        )
    mapping = make.mapping(z_dim=7, label_dim=3, embed=10, width=9, out=w_dim, layers=2, w_avg=True)
    synthesis = write.nvlabs_module("SynthesisNetwork", modules=blocks)
    return write.nvlabs_module("Generator", modules={"synthesis": synthesis, "mapping": mapping})


def discriminator(make, *, architecture="resnet", channels=(8, 6, 4)):
    modules = {}
    for i in range(len(channels) - 1, 0, -1):
        inputs, outputs, name = channels[i], channels[i - 1], f"b{4 * 2**i}"
        layers = {
            "conv0": make.conv(f"{name}.conv0", inputs, inputs, 3),
            "conv1": make.conv(f"{name}.conv1", inputs, outputs, 3),
            "skip": make.conv(f"{name}.skip", inputs, outputs, 1, bias=False),
        }
        if i == len(channels) - 1:
            layers["fromrgb"] = make.conv(f"{name}.fromrgb", 1, inputs, 1)
        modules[name] = write.nvlabs_module(
            "DiscriminatorBlock",
            tensors={"resample_filter": FILTER},
            modules=layers,
            architecture=architecture,
        )
    first = channels[0]
    epilogue = {
        "mbstd": write.nvlabs_module("MinibatchStdLayer", group_size=2, num_channels=2),
        "conv": make.conv("b4.conv", first + 2, first, 3, conv_clamp=None),
        "fc": make.linear("b4.fc", 16 * first, first),
        "out": make.linear("b4.out", first, 5),
    }
    modules["b4"] = write.nvlabs_module("DiscriminatorEpilogue", modules=epilogue)
    modules["mapping"] = make.mapping(
        z_dim=0, label_dim=3, embed=5, width=6, out=5, layers=3, w_avg=False
    )
    return write.nvlabs_module("Discriminator", modules=modules)
