"""The one device mesh, and how arrays lie on it; the only file that names a mesh axis.

Batches are split along their first axis over all devices, params are copied to each. `jax.jit` does
the rest: a mean over a sharded batch is a mean over the whole batch.
"""

from typing import Any

import jax
import numpy as np
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
