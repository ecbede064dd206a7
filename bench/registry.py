"""Times the registry and the matching of an image with all its keys.

    python -m bench.registry [--users 1000000] [--bits 64] [--folder DIR]

Registers the users in bulk, then some one by one, reads all keys back, and judges images, in one
thread. Prints wall-clock and processor time, which differ on a machine with other work; of repeated
calls the median with the 10th and 90th percentile.
"""

import argparse
import functools
import os
import tempfile
import time

import numpy as np

from bench import command
from lfp_jax.attribution import verdict
from lfp_jax.registry import DesignPoint, Registry

_SINGLE = 200  # users registered one by one, and issues
_IMAGES = 30


def _once(label, function):
    """Print the seconds of one call; gives what it returns."""
    start, processor = time.perf_counter(), time.process_time()
    result = function()
    processor, seconds = time.process_time() - processor, time.perf_counter() - start
    print(f"{label:<36}{seconds:9.2f} s  wall clock, processor {processor:.2f} s")
    return result


def _often(label, function, *, times):
    """Print the milliseconds of a call of function(0), function(1), ..."""
    spent = []
    for i in range(times):
        start, processor = time.perf_counter(), time.process_time()
        function(i)
        spent.append((time.perf_counter() - start, time.process_time() - processor))
    low, median, high = np.percentile(spent, [10, 50, 90], axis=0) * 1e3
    print(
        f"{label:<36}{median[0]:9.2f} ms wall clock ({low[0]:.2f} - {high[0]:.2f}), "
        f"processor {median[1]:.2f} ms ({low[1]:.2f} - {high[1]:.2f})"
    )


def _bench_registry(path, point, users):
    with Registry(path, create=True) as registry:
        design = registry.add_design(point)
        names = [f"user-{i:07d}" for i in range(users)]
        _once(f"register {users:,} users", lambda: registry.register(names, design=design))
        print(f"{'file':<36}{os.path.getsize(path) / 1e6:9.1f} MB")
        single = functools.partial(registry.register, design=design)
        _often("register a user, on disk", lambda i: single([f"one-{i}"]), times=_SINGLE)
        options = {"design": design, "images": 1, "noise": "constant", "settings": {}}
        _often(
            "issue an image, on disk", lambda i: registry.issue("one-0", **options), times=_SINGLE
        )
        return _once("read all keys", lambda: registry.packed_keys(design=design))


def _bench_matching(packed):
    rng = np.random.default_rng(0)
    users = verdict.index(packed.packed, bits=packed.bits)
    drawn = verdict.draw_decoys(bits=packed.bits)
    true = rng.integers(0, len(users), _IMAGES)
    bits = np.unpackbits(packed.packed[true], axis=1, count=packed.bits)
    marked = 3.0 * (2.0 * bits - 1.0 + 0.5 * rng.normal(size=bits.shape))
    foreign = 3.0 * rng.normal(size=bits.shape)
    for name, llr in (("user's", marked), ("foreign", foreign)):
        for score in ("soft", "hard"):
            for decoys in (None, drawn):
                judge = functools.partial(verdict.judge, users=users, score=score, decoys=decoys)
                label = f"{name} image, {score}{', decoys' if decoys else ''}"
                _often(label, lambda i, llr=llr, judge=judge: judge(llr[i]), times=_IMAGES)


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--folder", help="where to make the registry; default a temporary one")
    flags = parser.parse_args()
    point = DesignPoint("bench", "0" * 64, "0" * 64, flags.bits, 0, 1.0, "antipodal")
    load = os.getloadavg()[0]
    print(f"{flags.users:,} users, {flags.bits} bits; load {load:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        packed = _bench_registry(os.path.join(folder, "registry.db"), point, flags.users)
    _bench_matching(packed)


if __name__ == "__main__":
    command.run(main)
