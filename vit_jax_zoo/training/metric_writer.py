"""What a run writes down: TensorBoard files, `metrics.jsonl`, and figures as PNG.

    <workdir>/metrics.jsonl               a line for each write: {"step": 100, "train/loss": 0.5}
    <workdir>/events.out.tfevents.*       the same for TensorBoard, with figures, text and hparams
    <workdir>/figures/<name>_<step>.png   figures; a "/" in a name makes a directory

Numbers that JSON cannot hold are strings in `metrics.jsonl`: "NaN", "Infinity", "-Infinity", as
Python's `float` reads them. `read_metrics` gives them back as floats.

In a bucket (gs://...), files cannot grow: there they are written to a local directory first, and
`flush` uploads what has changed.

A run that is resumed at step s drops what its former life wrote about later steps, so that its log
ends like that of an undisturbed run.
"""

import concurrent.futures
import contextlib
import io
import json
import logging
import math
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore
from tensorboardX.record_writer import RecordWriter

from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.training import atomic_write as whole_file
from vit_jax_zoo.training import disk_errors as full_disk

FLUSH_SECONDS = 30
"""How long TensorBoard may have to wait for what is written."""


class EventFile:
  """Appends summaries to a new file."""

  def __init__(self, workdir: pathlib.Path, *, number: int, purge_step: int):
    """Begins the file.

    Args:
      workdir: where.
      number: of files before it: TensorBoard reads them in the order of their names, and two may be
        of the same second.
      purge_step: TensorBoard drops what files before this one say of this step and later ones.
    """
    name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{number:04d}"
    self._records = RecordWriter(os.fspath(workdir / name))
    self._flushed = time.monotonic()
    self._write(Event(file_version="brain.Event:2"))
    self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

  def add(self, summary: Summary, step: int = 0) -> None:
    """Writes a summary, one of `tensorboardX.summary`'s, of this training step."""
    self._write(Event(summary=summary, step=step))
    if time.monotonic() > self._flushed + FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Returns when all is on disk."""
    self._records.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes what is left, and closes the file."""
    self._records.close()

  def _write(self, event: Event) -> None:
    event.wall_time = time.time()
    self._records.write(event.SerializeToString())


METRICS_FILE = "metrics.jsonl"
FIGURES = "figures"

# A NaN is written as it is; that the library remarks on each one says nothing more.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class MetricWriter:
  """Writes scalars, figures, text and hyper-parameters of one run, in a thread of its own.

  Only process 0 writes; elsewhere, every method returns at once. What goes wrong while writing (a
  full disk) is raised by a later call. Use it as a context manager, or `close` it.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None = None,
    enabled: bool | None = None,
  ):
    """Opens the files.

    Args:
      workdir: the run's directory; made if missing.
      resume_step: training steps that the resumed checkpoint has behind it: what was written about
        later steps is dropped. None begins a new log, and drops all that is there.
      enabled: whether this process writes; by default, whether it is process 0.
    """
    self._enabled = jax.process_index() == 0 if enabled is None else enabled
    self._futures: list[concurrent.futures.Future[None]] = []
    if not self._enabled:
      return
    self._bucket = _Bucket(workdir) if "://" in os.fspath(workdir) else None
    self._workdir = self._bucket.local if self._bucket else pathlib.Path(workdir)
    last_step = -1 if resume_step is None else resume_step
    with self._disk_errors():
      self._workdir.mkdir(parents=True, exist_ok=True)
      path = self._workdir / METRICS_FILE
      _truncate(path, last_step)
      self._file = path.open("a", encoding="utf-8")
      self._tensorboard = EventFile(
        self._workdir,
        number=len(list(epath.Path(workdir).glob("events.out.tfevents.*"))),
        purge_step=last_step + 1,
      )
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="metric_writer")

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers. Arrays still being computed do not hold up the caller.

    Args:
      step: training steps completed.
      scalars: name to number or scalar array, for example {"train/loss": 0.5}.
    """
    self._submit(self._write_scalars, step, dict(scalars))

  def write_figures(self, step: int, figures: Mapping[str, Figure]) -> None:
    """Writes figures, by name, and closes them."""
    for name, figure in figures.items():
      if self._enabled:  # drawn here: matplotlib is not thread-safe
        self._submit(self._write_picture, step, name, render(figure))
      plt.close(figure)

  def write_text(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown texts, by name, for TensorBoard."""
    for name, text in texts.items():
      self._submit(self._write_text, step, name, text)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the configuration, nested dicts as "optimizer.learning_rate", for TensorBoard."""
    self._submit(self._write_hparams, dict(_flatten(hparams)))

  def flush(self) -> None:
    """Returns when all is on disk: call it before a checkpoint, so that no row can be missing."""
    if not self._enabled:
      return
    futures, self._futures = self._futures, []
    with self._disk_errors():
      for future in futures:
        future.result()
      self._file.flush()
      self._tensorboard.flush()
      if self._bucket:
        self._bucket.upload()

  def close(self) -> None:
    """Writes what is left, and closes the files."""
    if not self._enabled:
      return
    try:
      self.flush()
    finally:
      self._enabled = False
      self._pool.shutdown()
      parts = (self._file, self._tensorboard, *([self._bucket] if self._bucket else []))
      with self._disk_errors(), contextlib.ExitStack() as stack:
        for part in reversed(parts):
          stack.callback(part.close)  # each, whatever another one says

  def _submit(self, write: Callable[..., None], *args: Any) -> None:
    if not self._enabled:
      return
    with self._disk_errors():
      while self._futures and self._futures[0].done():  # one thread: they end in order
        self._futures.pop(0).result()
    self._futures.append(self._pool.submit(write, *args))

  def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
    return full_disk.explained(
      f"the log cannot be written to {self._workdir}",
      lambda: "make room, and give the same command again: it goes on from the last checkpoint",
    )

  def _write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    values = {name: _as_float(name, value) for name, value in scalars.items()}
    row = {"step": step} | {name: _json_safe(value) for name, value in values.items()}
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._tensorboard.add(summary.scalar(name, value), step)

  def _write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
    path = self._workdir / _figure_file(step, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_file.write(path, _png(pixels))
    self._tensorboard.add(summary.image(name, pixels, dataformats="HWC"), step)

  def _write_text(self, step: int, name: str, text: str) -> None:
    self._tensorboard.add(summary.text(name, text), step)

  def _write_hparams(self, hparams: Mapping[str, Any]) -> None:
    for part in summary.hparams(dict(hparams), {}):
      self._tensorboard.add(part)


class _Bucket:
  """A local directory whose files are copied to a remote one."""

  def __init__(self, remote: str | os.PathLike[str]):
    self._remote = epath.Path(remote)
    self._directory = tempfile.TemporaryDirectory(prefix="metrics_")
    self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
    self.local = pathlib.Path(self._directory.name)
    if (self._remote / METRICS_FILE).exists():
      (self.local / METRICS_FILE).write_bytes((self._remote / METRICS_FILE).read_bytes())

  def upload(self) -> None:
    """Copies the files that have changed since the last time."""
    for path in self.local.rglob("*"):
      stat = path.stat()
      version = (stat.st_mtime_ns, stat.st_size)
      if path.is_dir() or self._uploaded.get(path) == version:
        continue
      target = self._remote / path.relative_to(self.local)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
      self._uploaded[path] = version

  def close(self) -> None:
    """Uploads the rest, and removes the local directory."""
    self.upload()
    self._directory.cleanup()


def save_figures(workdir: str | os.PathLike[str], step: int, figures: Mapping[str, Figure]) -> None:
  """Writes figures where a run has its own, and nothing else: its log stays as it is."""
  for name, figure in figures.items():
    path = epath.Path(workdir) / _figure_file(step, name)
    with full_disk.explained(f"{path} cannot be written"):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(_png(render(figure)))
    plt.close(figure)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a run's `metrics.jsonl`, oldest first; all values but `step` are floats."""
  lines = (epath.Path(workdir) / METRICS_FILE).read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [{k: v if k == "step" else float(v) for k, v in row.items()} for row in rows]


def _truncate(path: pathlib.Path, last_step: int) -> None:
  """Drops the rows about steps after `last_step`, and a last row that a kill cut short."""
  if not path.exists():
    return
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  kept = [line for line in lines if _step_of(line) <= last_step]
  if kept != lines:
    whole_file.write(path, "".join(kept))


def _step_of(line: str) -> float:
  try:
    return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
  except (ValueError, KeyError, TypeError):
    return math.inf


def _as_float(name: str, value: Any) -> float:
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"metric {name!r} has shape {array.shape}; write_scalars takes single numbers")
  return float(array.reshape(()))


def _json_safe(value: float) -> float | str:
  if math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _figure_file(step: int, name: str) -> str:
  return f"{FIGURES}/{name}_{step:08d}.png"


def _png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="png")
  return buffer.getvalue()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      number = isinstance(value, bool | int | float | str)
      yield f"{prefix}{key}", value if number else str(value)
