"""What the benchmarks share: functions timed in turn, ratios, and memory of a process alone."""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import time

import jax
import numpy as np
import psutil

_PAUSE = 0.02  # seconds; threads of the one library stop spinning before the other begins
_LEAST_ROUNDS = 5
_AGREE = 2e-4  # greatest difference, over the greatest value


def seconds(function):
    """Time one call, which must block until its result is there."""
    time.sleep(_PAUSE)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(functions, *, rounds, budget=float("inf")):
    """Time functions in turn, once each a round, after one round that does not count.

    Args:
        functions: what to call; each blocks.
        rounds: how many, at most.
        budget: seconds after which no further round begins, once there are five.

    Returns:
        Seconds [rounds, functions].
    """
    for function in functions:
        function()
    start, times = time.monotonic(), []
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.monotonic() - start > budget:
            break
        times.append([seconds(function) for function in functions])
    return np.array(times)


def quickest(makers, *, rounds=2):
    """Give the name of the quickest function, by its best call after one that does not count.

    Args:
        makers: by name, what makes the function; made one after the other, to save memory.
        rounds: calls of each that count.
    """
    best = {}
    for name, make in makers.items():
        function = make()
        function()
        best[name] = min(seconds(function) for _ in range(rounds))
        del function
    return min(best, key=best.get)


def ratio(slow, fast):
    """Give the median of the rounds' ratios slow / fast, and their 10th and 90th percentile."""
    low, value, high = np.percentile(np.asarray(slow) / np.asarray(fast), [10, 50, 90])
    return {"value": float(value), "low": float(low), "high": float(high), "rounds": len(slow)}


def check_agreement(ours, theirs):
    """Compare what JAX and PyTorch computed: vectors, or images NHWC and NCHW.

    Raises:
        AssertionError: they differ by more than 2e-4 of the greatest value.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not difference <= _AGREE:
        raise AssertionError(f"JAX and PyTorch differ by {difference:.1e} > {_AGREE}.")


def machine():
    """Name the device, the version of JAX and what else runs, for JSON."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": psutil.cpu_count(),
        "load_at_start": psutil.getloadavg()[0],
        "jax": jax.__version__,
    }


def described(machine):
    """Lay a machine out as one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def peak_mebibytes():
    """Give the most memory this process has held so far, or since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak():
    """Start the peak anew (Linux), with what was freed given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def median(values):
    """Give the median as a plain number, for JSON."""
    return float(statistics.median(values))


def alone(function, *args, gibibytes):
    """Call a function in a fresh process that may take so much memory.

    Args:
        function: at module level; what it returns must pickle.
        args: its arguments.
        gibibytes: of data; beyond it the process fails, and not the machine.

    Returns:
        The result, or None where the process failed (what it said is on stderr).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(sender, int(gibibytes * 2**30), function, args))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _call(sender, limit, function, args):
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sender.send(function(*args))
