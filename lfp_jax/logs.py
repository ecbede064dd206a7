"""What a run says while it runs: JSON lines of metrics, JSON files, a progress line.

Every file here is complete at all times: a JSON file is replaced in one step, a line is appended in
one write. Numbers may be Python, numpy or jax scalars; NaN and infinity, which JSON lacks, become
null.
"""

import collections
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TextIO

import lfp_jax
from lfp_jax import files
from lfp_jax.errors import UserError

_LINE_SECONDS = 30.0  # between lines where the stream is a file: a log must not fill with them
_REDRAW_SECONDS = 0.2  # between redraws where the stream is a terminal
_DEEPEST = 100  # of JSON's nesting: Python versions differ in what they bear


def write_file(path: str | os.PathLike, text: str) -> None:
    """Write a file in one step, making its folder: readers see the old file or the new one.

    Args:
      path: the file.
      text: its content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        Path(part).write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file as `write_file` does.

    Args:
      path: the file.
      value: anything JSON can say, with arrays and scalars of numpy or jax in it.
    """
    write_file(path, to_text(value))


def to_text(value: Any) -> str:
    """Write a value as the text of a JSON file; takes what `write_json` takes."""
    return json.dumps(_plain(value), indent=2) + "\n"


def to_line(value: Any) -> str:
    """Write a value as one line of JSON; takes what `write_json` takes."""
    return json.dumps(_plain(value))


def versions() -> dict[str, str]:
    """Give the versions of the packages that results rest on."""
    names = ("jax", "jaxlib", "flax", "numpy")
    others = {name: importlib.metadata.version(name) for name in names}
    return {"lfp_jax": lfp_jax.__version__, **others}


def from_text(data: str | bytes, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Read JSON of whoever's making; all that it gives can be written again.

    Args:
      data: the text.
      parse_constant: as of `json.loads`, for NaN and infinity.

    Raises:
      ValueError: it is no JSON, nested 100 deep, or holds a text that is not Unicode.
    """
    try:
        value = json.loads(data, parse_constant=parse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for each in level for child in _children(each)]
    if level:
        raise ValueError("it is nested too deep")
    return value


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def discard(stream: TextIO) -> None:
    """Send nowhere what is still written to a stream, for one whose reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that a killed process left unfinished is dropped.

    Raises:
        UserError: another line holds no JSON object.
    """
    data, lines = Path(path).read_bytes(), []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            lines.append(from_text(line))
        except ValueError:
            lines.append(None)
        if not isinstance(lines[-1], dict):
            raise UserError(f"Line {number} of '{path}' holds no JSON object. Delete that line.")
    return lines


class MetricLog:
    """A JSON-lines file of metrics, copied to TensorBoard where that package is installed."""

    def __init__(self, path: str | os.PathLike, *, tensorboard: bool = False):
        """Open the log for appending, making its folder.

        Args:
          path: the `.jsonl` file.
          tensorboard: also write TensorBoard events into the file's folder; without the
            `tensorboard` package this does nothing.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._events = _event_writer(self._path.parent) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        """Append one line, `{"step": ..., "time": ..., **values}`, in a single write.

        Args:
          step: how many steps (or images) the run has done.
          **values: the metrics of this step by name.
        """
        record = _plain({"step": step, "time": round(time.time(), 3), **values})
        with self._path.open("ab", buffering=0) as file:
            file.write((json.dumps(record) + "\n").encode())
        if self._events is not None:
            self._events(step, {k: v for k, v in record.items() if isinstance(v, int | float)})

    def truncate(self, step: int) -> None:
        """Drop the lines after a step, so that a resumed run's log equals an uninterrupted one's.

        Args:
          step: the step resumed from; the lines up to and including it are kept.

        Raises:
          UserError: a line is damaged.
        """
        if not self._path.exists():
            return
        lines = read_lines(self._path)
        for number, line in enumerate(lines, 1):
            if not isinstance(line.get("step"), int | float):
                raise UserError(f"Line {number} of '{self._path}' has no step. Delete that line.")
        kept = [json.dumps(line) for line in lines if line["step"] <= step]
        write_file(self._path, "".join(f"{line}\n" for line in kept))


class Progress:
    """A progress line: how many, how many a second, how much longer.

    On a terminal one line is redrawn; in a file a line is added about every 30 seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str = "images",
        label: str = "",
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start the clock.

        Args:
          total: how many there are to do.
          unit: what is counted, in the plural.
          label: what is being done, before the numbers.
          start: how many an earlier run has done already.
          stream: where to write; default standard error.
          clock: gives the time in seconds.
        """
        self._total, self._unit, self._label = total, unit, label
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._redraws = self._stream.isatty()
        self._interval = _REDRAW_SECONDS if self._redraws else _LINE_SECONDS
        self._shown_at = -math.inf if self._redraws else clock()
        # One sample a second for a minute: the rate is recent, and forgets a slow first step.
        self._samples = collections.deque([(clock(), start)], maxlen=60)
        self._done = start
        self._values: dict[str, float] = {}

    def update(self, done: int, **values: float) -> None:
        """Say how many are done in all; writes only if the last line is old enough.

        Args:
          done: how many are done, counted from zero.
          **values: numbers to show after it, e.g. the loss.
        """
        now = self._clock()
        self._done, self._values = done, values
        if now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, done))
        if now - self._shown_at >= self._interval:
            self._shown_at = now
            self._show(now)

    def _show(self, now: float) -> None:
        then, count = self._samples[0]
        rate = (self._done - count) / max(now - then, 1e-9)
        left = _duration((self._total - self._done) / rate) if rate > 0 else "?"
        parts = [f"{self._done}/{self._total} {self._unit}", f"{rate:.3g}/s", f"{left} left"]
        parts += [f"{name} {float(value):.4g}" for name, value in self._values.items()]
        line = f"{self._label}: {', '.join(parts)}" if self._label else ", ".join(parts)
        self._stream.write(f"\r{line}\x1b[K" if self._redraws else f"{line}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the last numbers and end the line."""
        self._show(self._clock())
        if self._redraws:
            self._stream.write("\n")
            self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _plain(value: Any) -> Any:
    """Turn arrays and scalars into what JSON can say."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def _event_writer(folder: Path) -> Callable[[int, dict[str, float]], None] | None:
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    writer = EventFileWriter(str(folder))

    def write(step: int, values: dict[str, float]) -> None:
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        )
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    return write
