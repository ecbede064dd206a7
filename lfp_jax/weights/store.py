"""The native store: arrays by Orbax, metadata as JSON beside them. The only user of Orbax."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from lfp_jax.errors import UserError

_METADATA = "metadata.json"
_ARRAYS = "arrays"


def save(path, tree, metadata):
    """Write a pytree of arrays and a JSON-able dict as one folder, atomically.

    Of several processes only 0 may: of any other Orbax would keep no NumPy array, and say nothing.

    Args:
        path: the folder to make; one that exists is replaced only when the new one is whole.
        tree: nested dicts, lists and arrays.
        metadata: what the arrays are (names, sizes, hashes, licence).

    Raises:
        OSError: the folder cannot be written.
    """
    assert jax.process_index() == 0
    path = os.path.abspath(path)
    temporary, old = f"{path}.tmp{os.getpid()}", f"{path}.old{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(os.path.join(temporary, _ARRAYS), jax.tree.map(np.asarray, tree))
        with open(os.path.join(temporary, _METADATA), "w", encoding="utf-8") as file:
            json.dump(metadata, file, indent=1)
        if os.path.lexists(path):
            os.replace(path, old)  # a folder cannot be renamed over a full one
        os.replace(temporary, path)
    except ValueError as error:  # how TensorStore says that a write failed
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise OSError(errno.ENOSPC, full, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def is_store(path):
    """Tell whether a path is a folder that `save` made."""
    return os.path.isfile(os.path.join(path, _METADATA))


def load(path):
    """Read a folder that `save` made.

    Returns:
        (tree of numpy arrays with the stored dtypes, metadata dict).

    Raises:
        UserError: the folder is missing, of another kind, or damaged.
    """
    if not os.path.isdir(path):
        raise UserError(f"'{path}' is not a weight store: there is no such folder.")
    if not is_store(path):
        raise UserError(f"'{path}' is not a weight store: it has no {_METADATA}.")
    try:
        with open(os.path.join(path, _METADATA), encoding="utf-8") as file:
            metadata = json.load(file)
        arrays = os.path.abspath(os.path.join(path, _ARRAYS))
        with _checkpointer() as checkpointer:
            structure = checkpointer.metadata(arrays).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
            tree = checkpointer.restore(arrays, restore_args=as_numpy)
    except Exception as error:  # Orbax, TensorStore and json raise many kinds for a damaged file
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"The weight store '{path}' is damaged: {cause}") from None
    if not isinstance(metadata, dict):
        raise UserError(f"The weight store '{path}' is damaged: {_METADATA} holds no object.")
    return tree, metadata


def _checkpointer():
    """Open a checkpointer that waits for no other process."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def checkpoints(directory, *, keep=2):
    """Open the training checkpoints of a run (an Orbax manager: atomic, the newest `keep`).

    Use `.save(step, args=...)` through `save_step`, `.latest_step()` and `restore_step`.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(os.path.abspath(directory), options=options)


def save_step(manager, step, state):
    """Write the training state of a step; returns once it is whole on disk."""
    manager.save(step, args=ocp.args.StandardSave(state), force=True)
    manager.wait_until_finished()


def restore_step(manager, step, *, like):
    """Read the training state of a step, with the shapes, dtypes and shardings of `like`."""
    return manager.restore(step, args=ocp.args.StandardRestore(like))
