"""Feeds damaged files to one reader, and says how it took them: `fuzz_runner.py READER COUNT SEED`.

A process of its own, so that a crash, an endless loop or a memory bomb is a failure and not the end
of the tests. One line of JSON on standard output.
"""

import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

_MEMORY = 2**30  # bytes above what the process had before the first damaged file
_SECONDS = 30  # for one file
_SHOWN = 5  # failures that are told in full
# What a reader of data has no business to do.
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
    "subprocess.Popen", "socket.connect", "urllib.Request", "pickle.find_class", "ctypes.dlopen",
)  # fmt: skip

warnings.simplefilter("always")  # before the library is imported, which may ignore some itself


class _Watch:
    """Hears of everything that Python does while a file is read, and of every warning."""

    def __init__(self):
        self.heard, self._on = [], False
        sys.addaudithook(self._hear)
        warnings.showwarning = self._warn

    def __enter__(self):
        self.heard, self._on = [], True
        return self

    def __exit__(self, *_):
        self._on = False

    def _hear(self, event, arguments):
        if not self._on:
            return
        outside = event == "open" and "outside" in os.fsdecode(str(arguments[0]))
        if event in _FORBIDDEN or outside:
            self.heard.append(f"{event} {arguments!r:.200}")

    def _warn(self, message, category, *_):
        if self._on:
            self.heard.append(f"{category.__name__}: {message}")


def _limit():
    """Let the process grow by a gibibyte, and start measuring its peak anew."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    size = int(status["VmData"].split()[0]) * 1024 + _MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field):
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def _too_slow(*_):
    raise TimeoutError(f"more than {_SECONDS} s")


def _lay_out(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _out_of_memory(error):
    """Tell whether it was the want of memory that a reader made a line of."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__context__
    return False


def judge(reader, folder, watch):
    """Read a folder; give "accepted", "refused", or what went wrong."""
    from lfp_jax.errors import UserError

    verdict = "accepted"
    signal.alarm(_SECONDS)
    try:
        with watch:
            reader.read(folder)
    except UserError as error:
        verdict = "refused"
        if "\n" in str(error) or len(str(error)) > 2000:
            verdict = f"a message of many lines or letters: {str(error)!r:.300}"
        if _out_of_memory(error):
            verdict = f"out of memory: {error}"
    except BaseException:  # whatever it is, it is what the test is after
        verdict = traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
    return "; ".join(watch.heard) if watch.heard else verdict


def _mutants(reader, files, count, seed):
    """Yield (name of the mutant, its files): the hostile ones, then random ones."""
    import fuzz_mutations
    import numpy as np

    for name, changed in reader.hostile().items():
        yield name, files | changed
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        ending = reader.damaged[rng.integers(len(reader.damaged))]
        names = [name for name in files if name.endswith(ending)]
        name = names[rng.integers(len(names))]
        yield f"{i} {name}", files | {name: fuzz_mutations.mutate(rng, files[name], name)}


def run(reader, count, seed):
    """Feed a reader so many random mutants; give the figures."""
    home = Path(tempfile.mkdtemp(prefix="fuzz"))
    folder, files = home / "files", {}
    os.chdir(home)
    folder.mkdir()
    reader.write(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    watch = _Watch()
    signal.signal(signal.SIGALRM, _too_slow)
    assert judge(reader, folder, watch) == "accepted", judge(reader, folder, watch)
    gc.collect()
    before, start, failures = _limit(), time.monotonic(), []
    told = {"accepted": 0, "refused": 0}
    for label, mutant in _mutants(reader, files, count, seed):
        (home / "now").write_text(label)  # the name of the culprit, should it end the process
        _lay_out(folder, mutant)
        verdict = judge(reader, folder, watch)
        if verdict in told:
            told[verdict] += 1
        else:
            failures.append(f"{label}: {verdict}")
    grown = _resident("VmHWM") - before
    ran = [str(path) for path in home.iterdir() if path.name not in ("files", "now")]
    shutil.rmtree(home)
    failures += [f"it left {ran}: something was run"] if ran else []
    seconds = round(time.monotonic() - start, 1)
    return told | {"failed": len(failures), "failures": failures[:_SHOWN], "seconds": seconds,
                   "grown_mib": round(grown)}  # fmt: skip


if __name__ == "__main__":
    from fuzz_stores import READERS  # all of them

    print(json.dumps(run(READERS[sys.argv[1]], *map(int, sys.argv[2:]))))
