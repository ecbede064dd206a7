"""The native store: arrays by Orbax, metadata as JSON beside them. The only user of Orbax."""

import contextlib
import errno
import json
import math
import os
import shutil
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from lfp_jax.errors import UserError

_METADATA = "metadata.json"
_ARRAYS = "arrays"
_FREE = 2**28  # bytes that a store may take in memory, whatever it takes on disk
_SWELLS = 32  # above that: how many times its bytes on disk

# Orbax leaves one behind where its metadata are damaged.
warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


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
            _check_size(arrays, structure)
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


def _check_size(arrays, structure):
    """Refuse a few bytes that would become gigabytes: an array of zeros is stored as nothing."""
    claimed = 0
    for leaf in jax.tree.leaves(structure):
        shapes = [leaf.shape, leaf.storage.chunk_shape if leaf.storage else ()]
        most = max(math.prod(shape or ()) for shape in shapes)  # chunks are read whole
        claimed += most * np.dtype(leaf.dtype).itemsize
    held = sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(arrays)
        for name in names
    )
    if claimed > _FREE + _SWELLS * held:
        raise ValueError(f"its {held:,} bytes would become {claimed:,}")


@contextlib.contextmanager
def taken_apart(path, what):
    """Say in one line that a store holds no `what`, if the block cannot make one of its content.

    Args:
        path: the folder.
        what: what it should hold, for the message.

    Raises:
        UserError: the block failed as it does where entries are missing or of another kind.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"The weight store '{path}' is damaged: it holds no {what}.") from None


def checkpoints(directory, *, keep=2):
    """Open the training checkpoints of a run (an Orbax manager: atomic, the newest `keep`).

    Use `.save(step, args=...)` through `save_step`, `.latest_step()` and `restore_step`.

    Raises:
        UserError: a checkpoint there is damaged.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    directory = os.path.abspath(directory)
    with _in_words(directory):
        return ocp.CheckpointManager(directory, options=options)


def save_step(manager, step, state):
    """Write the training state of a step; returns once it is whole on disk."""
    manager.save(step, args=ocp.args.StandardSave(state), force=True)
    manager.wait_until_finished()


def restore_step(manager, step, *, like):
    """Read the training state of a step, with the shapes, dtypes and shardings of `like`.

    Raises:
        UserError: it is damaged, or of another run.
    """
    with _in_words(os.path.join(manager.directory, str(step))):
        return manager.restore(step, args=ocp.args.StandardRestore(like))


@contextlib.contextmanager
def _in_words(path):
    """Say in one line that checkpoints cannot be read."""
    try:
        yield
    except Exception as error:  # Orbax, TensorStore and json raise many kinds for a damaged file
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # the disk is full or read-only, which main says
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"Training cannot go on from '{path}': {cause}. Delete the last checkpoint to go on "
            "from the one before."
        ) from None
