"""Convolution and resampling primitives shared by the networks.

All images are NHWC, all kernels HWIO. Filters are separable and short, so FIR resampling is written
as shifted sums: on CPU a depthwise convolution is two orders of magnitude slower, on accelerators
XLA fuses the sums into one pass over memory.

Two forms have rules of differentiation of their own, because XLA on CPU runs what it derives by
itself up to several times slower: weight gradients are one matrix product a kernel tap there; and
the derivatives of `conv` are its two transposes, whose own are again `conv` and these two, where
second derivatives (the R1 penalty) would meet convolutions dilated twice. A custom rule blocks
forward mode, so it is asked for by `trainable=True`; Jacobians use the plain forms.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, *, stride=1, padding=None, trainable=False):
    """Convolve images [n, h, w, i] with a kernel [r, c, i, o] (correlation, as networks do).

    Args:
        padding: pixels on every side; default (r - 1) // 2, which keeps the size at stride 1.
        trainable: quick in reverse mode, of any order, and impossible in forward mode.
    """
    pad = (kernel.shape[0] - 1) // 2 if padding is None else padding
    return (_trainable_conv if trainable else _conv)(x, kernel, stride, pad)


def _conv(x, kernel, stride, pad):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=_LAYOUT
    )


# A convolution is linear in the image and in the kernel. It and its two transposes are each
# bilinear, and the transposes of each are the other two.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _trainable_conv(x, kernel, stride, pad):
    return _conv(x, kernel, stride, pad)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _to_image(y, kernel, shape, stride, pad):
    """Transpose in the image: [n, h', w', o] -> an image of this shape."""
    image = jax.ShapeDtypeStruct(shape, y.dtype)
    return jax.linear_transpose(lambda x: _conv(x, kernel, stride, pad), image)(y)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _to_kernel(x, y, shape, stride, pad):
    """Transpose in the kernel: [n, h, w, i], [n, h', w', o] -> a kernel of this shape."""
    height, width = y.shape[1:3]

    def as_derived(x, y):
        kernel = jax.ShapeDtypeStruct(shape, x.dtype)
        return jax.linear_transpose(lambda kernel: _conv(x, kernel, stride, pad), kernel)(y)[0]

    def by_tap(x, y):
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

        def tap(row, column):
            reached = x[:, row::stride, column::stride][:, :height, :width]
            return jnp.einsum("nhwi,nhwo->io", reached, y)

        return _kernel_of(tap, shape[0])

    return lax.platform_dependent(x, y, cpu=by_tap, default=as_derived)


def _kernel_of(tap, size):
    """Put the taps [i, o] of a kernel together."""
    taps = [[tap(row, column) for column in range(size)] for row in range(size)]
    return jnp.stack([jnp.stack(row) for row in taps])


def _conv_backward(stride, pad, operands, grad):
    x, kernel = operands
    into_image = _to_image(grad, kernel, x.shape, stride, pad)
    return into_image, _to_kernel(x, grad, kernel.shape, stride, pad)


def _to_image_backward(shape, stride, pad, operands, grad):
    y, kernel = operands
    into_kernel = _to_kernel(grad, y, kernel.shape, stride, pad)
    return _trainable_conv(grad, kernel, stride, pad), into_kernel


def _to_kernel_backward(shape, stride, pad, operands, grad):
    x, y = operands
    return _to_image(y, grad, x.shape, stride, pad), _trainable_conv(x, grad, stride, pad)


def _with_operands(function):
    return lambda *args: (function(*args), args[:2])


_trainable_conv.defvjp(_with_operands(_trainable_conv), _conv_backward)
_to_image.defvjp(_with_operands(_to_image), _to_image_backward)
_to_kernel.defvjp(_with_operands(_to_kernel), _to_kernel_backward)


def _transposed(x, kernel):
    """Transposed convolution of stride 2: [n, h, w, i] -> [n, 2 h - 1 + r - 1, ..., o]."""
    pad = kernel.shape[0] - 1
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((pad, pad), (pad, pad)),
        lhs_dilation=(2, 2),
        dimension_numbers=_LAYOUT,
    )


@jax.custom_vjp
def _trainable_transposed(x, kernel):
    return _transposed(x, kernel)


def _transposed_forward(x, kernel):
    return _transposed(x, kernel), (x, kernel)


def _transposed_backward(residuals, grad):
    x, kernel = residuals
    (x_grad,) = jax.vjp(lambda x: _transposed(x, kernel), x)[1](grad)
    height, width = x.shape[1:3]
    size = kernel.shape[0]

    def tap(row, column):
        # Input pixel (i, j) reaches output (2 i + size - 1 - row, 2 j + size - 1 - column).
        reached = grad[:, size - 1 - row :: 2, size - 1 - column :: 2][:, :height, :width]
        return jnp.einsum("nhwi,nhwo->io", x, reached)

    return x_grad, _kernel_of(tap, size)


_trainable_transposed.defvjp(_transposed_forward, _transposed_backward)


def _fir_axis(x, taps, axis, pad):
    padding = [(0, 0)] * x.ndim
    padding[axis] = pad
    x = jnp.pad(x, padding)
    size = x.shape[axis] - len(taps) + 1
    # A true convolution: the filter is flipped (it only matters for asymmetric filters).
    return sum(
        tap * lax.slice_in_dim(x, i, i + size, axis=axis) for i, tap in enumerate(taps[::-1])
    )


def fir(x, taps, *, pad, gain=1.0):
    """Filter rows and columns of [n, h, w, c] with `taps`, normalised to sum sqrt(gain) an axis."""
    scale = gain**0.5 / sum(taps)
    taps = [tap * scale for tap in taps]
    return _fir_axis(_fir_axis(x, taps, 1, pad), taps, 2, pad)


def upsample(x, taps):
    """Double the size of [n, h, w, c]: zeros between pixels, then the FIR filter with gain 4.

    The zeros are never made: each of the two output phases is a short sum of shifted inputs.
    """
    scale = 2.0 / sum(taps)
    taps = [tap * scale for tap in taps]
    return _upsample_axis(_upsample_axis(x, taps, 1), taps, 2)


def _upsample_axis(x, taps, axis):
    lead = (len(taps) + 1) // 2  # padding before, on the grid with zeros between
    reach = len(taps)
    size = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (reach, reach)
    x = jnp.pad(x, padding)
    flipped = taps[::-1]
    phases = []
    for phase in (0, 1):
        total = 0.0
        for i, tap in enumerate(flipped):
            position = phase + i - lead  # on the doubled grid; only even places hold pixels
            if position % 2 == 0:
                start = reach + position // 2
                total = total + tap * lax.slice_in_dim(x, start, start + size, axis=axis)
        phases.append(total)
    stacked = jnp.stack(phases, axis=axis + 1)
    return stacked.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def downsample(x, taps, *, pad):
    """Filter [n, h, w, c] and keep every second pixel of every second row."""
    return fir(x, taps, pad=pad)[:, ::2, ::2]


def up_conv(x, kernel, taps, *, trainable=False):
    """Convolve and double the size: transposed convolution of stride 2, then FIR with gain 4.

    The kernel is stored as `torch.nn.functional.conv_transpose2d` reads it, hence the flip.
    """
    size = kernel.shape[0]
    flipped = kernel[::-1, ::-1]
    x = _trainable_transposed(x, flipped) if trainable else _transposed(x, flipped)
    reach = len(taps) - 2 - (size - 1)
    return fir(x, taps, pad=((reach + 1) // 2 + 1, reach // 2 + 1), gain=4.0)


def down_conv(x, kernel, taps):
    """FIR filter, then convolve with stride 2: half the size. Also for 1 x 1 kernels; trainable."""
    size = kernel.shape[0]
    total = len(taps) - 2 + size - 1
    pad = ((total + 1) // 2, total // 2)
    if size == 1:
        return conv(downsample(x, taps, pad=pad), kernel, trainable=True)
    return conv(fir(x, taps, pad=pad), kernel, stride=2, padding=0, trainable=True)
