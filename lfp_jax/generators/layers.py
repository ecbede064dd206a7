"""Convolution and resampling primitives shared by the networks.

All images are NHWC, all kernels HWIO. Filters are separable and short, so FIR resampling is written
as shifted sums: on CPU a depthwise convolution is two orders of magnitude slower, on accelerators
XLA fuses the sums into one pass over memory.

`up_conv` has a rule of its own for the weight gradient (one matrix product a kernel tap): XLA on
CPU runs the dilated convolution of automatic differentiation several times slower. A custom rule
blocks forward mode, so it is asked for by `trainable=True`; Jacobians use the plain form.
"""

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, *, stride=1, padding=None):
    """Convolve images [n, h, w, i] with a kernel [r, c, i, o] (correlation, as networks do).

    Args:
        padding: pixels on every side; default (r - 1) // 2, which keeps the size at stride 1.
    """
    pad = (kernel.shape[0] - 1) // 2 if padding is None else padding
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=_LAYOUT
    )


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

    taps = [[tap(row, column) for column in range(size)] for row in range(size)]
    return x_grad, jnp.stack([jnp.stack(row) for row in taps])


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
    """FIR filter, then convolve with stride 2: half the size. Also for 1 x 1 kernels."""
    size = kernel.shape[0]
    total = len(taps) - 2 + size - 1
    pad = ((total + 1) // 2, total // 2)
    if size == 1:
        return conv(downsample(x, taps, pad=pad), kernel)
    return conv(fir(x, taps, pad=pad), kernel, stride=2, padding=0)
