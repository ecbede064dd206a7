"""The one device mesh, and how arrays lie on it; the only file that names a mesh axis.

Batches are split along their first axis over all devices, params are copied to each. `jax.jit` does
the rest: a mean over a sharded batch is a mean over the whole batch.

Work that is led by the host, image by image, has no such program. Of that each of several processes
does its share, on its own devices, and all get the results of all (`spread`, `gather`).
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lfp_jax.errors import UserError

_AXIS = "data"


def join(*, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of several that compute together; before any device is touched.

    Args:
      coordinator: HOST:PORT of process 0; None where the cluster tells all three (TPU pod, Slurm).
      processes: how many there are.
      process: which this one is, from 0 on.

    Raises:
      UserError: the others cannot be reached, or nothing tells who they are. A process never goes
        on alone.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--distributed: this process could not join the others: {cause}") from None
    with _on_stderr():
        gather([])


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """Send to standard error what Gloo says on standard output, where answers go."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def mesh(*, devices: list[jax.Device] | None = None) -> Mesh:
    """Make the mesh: one axis over all devices.

    Args:
      devices: the devices to use; default all devices of all processes.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Give the sharding of a batch, for `jax.jit`: the first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(_AXIS))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Give the sharding of params, for `jax.jit`: a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def shard(mesh: Mesh, tree: Any) -> Any:
    """Spread a batch over the devices.

    Args:
      mesh: the mesh.
      tree: arrays [n, ...]; with several processes each gives its own share of the batch, and the
        shares follow one another in the order of the processes.

    Returns:
      The same tree of global arrays [n * processes, ...].

    Raises:
      UserError: n does not divide evenly among this process's devices.
    """
    sharding = batch_sharding(mesh)
    local = len(mesh.local_devices)

    def place(leaf: Any) -> jax.Array:
        if leaf.shape[0] % local:
            raise UserError(
                f"A batch must divide evenly over the devices; got {leaf.shape[0]} over {local}."
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy a tree of arrays or numbers, the same in every process, to each device of the mesh."""
    sharding = replicated_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), sharding), tree)


def is_first() -> bool:
    """Tell whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Go on when every process has come to a place of the program, of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def first_alone(make: Callable[[], Any]) -> Any:
    """Call a function in process 0, and then, when what it wrote is there, in the others."""
    made = make() if is_first() else None
    wait_for_all("first_alone")
    return made if is_first() else make()


def spread(function: Callable[[np.ndarray], Any], n: int) -> Any:
    """Have each process do its share of n rows; every process gets all.

    Args:
      function: of consecutive rows' indices [m], not none, to a tree of arrays [m, ...]. Shares are
        of one size: the indices of the last ones repeat the last row.
      n: how many rows, at least 1; the same in all processes.

    Returns:
      A tree of NumPy arrays [n, ...].
    """
    size = -(-n // jax.process_count())
    rows = np.minimum(np.arange(size) + jax.process_index() * size, n - 1)
    return jax.tree.map(lambda leaf: stack(np.asarray(leaf))[:n], function(rows))


def gather(values: list[Any]) -> list[Any]:
    """Put the lists of all processes together in every process, in the processes' order.

    Args:
      values: JSON values, of each process as many as it likes.
    """
    if jax.process_count() == 1:
        return values
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = stack(np.array([text.size], np.int32))
    rows = stack(np.pad(text, (0, sizes.max() - text.size))[None])
    texts = [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
    return [value for text in texts for value in json.loads(text)]


def stack(array: np.ndarray) -> np.ndarray:
    """Put the arrays [m, ...] of all processes one after another, in every process.

    Args:
      array: of the same shape and type in all.

    Returns:
      [m * processes, ...], in the order of the processes.
    """
    if jax.process_count() == 1:
        return array
    # As bytes: on the way JAX would round 64 bits to 32.
    flat = np.ascontiguousarray(array.reshape(len(array), -1)).view(np.uint8)
    joined = np.ascontiguousarray(multihost_utils.process_allgather(flat, tiled=True))
    return joined.view(array.dtype).reshape(-1, *array.shape[1:])
