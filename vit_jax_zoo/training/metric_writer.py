"""Writes a run's metrics.jsonl, TensorBoard event files, and figures (figures/<name>_<step>.png).

A row of `metrics.jsonl` is `{"step": 100, "train/loss": 0.5}`; NaN and infinities are strings:
"NaN", "Infinity", "-Infinity". A run that resumes removes the rows of later steps. Objects in a
bucket (gs://...) cannot be appended to: files are written to a local directory, and uploaded by
`flush`. `loggers` has the other services.
"""

import concurrent.futures
import contextlib
import glob
import io
import json
import math
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from vit_jax_zoo.errors import escape_surrogates, one_line
from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.training import disk
from vit_jax_zoo.training.distributed import is_primary
from vit_jax_zoo.training.loggers import open_services


class EventFile:
  """A TensorBoard event file, which replaces the steps from `purge_step` on of earlier ones.

  `number`, that of earlier files, orders those created within the same second by their names.
  """

  def __init__(self, workdir: pathlib.Path, *, number: int, purge_step: int):
    name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{number:04d}"
    self._records = RecordWriter((workdir / name).open("wb"))
    self.flush, self.close = self._records.flush, self._records.close
    self.write(file_version="brain.Event:2")
    self.write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

  def write(self, **event: Any) -> None:
    """Writes an event with these fields."""
    self._records.write(Event(wall_time=time.time(), **event).SerializeToString())


METRICS_FILE = "metrics.jsonl"
FIGURES = "figures"
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class MetricWriter(contextlib.AbstractContextManager["MetricWriter"]):
  """Writes scalars, figures, text and hyper-parameters of one run, in a background thread.

  Errors of the thread (a full disk) are raised by `flush`, so that training continues to the next
  checkpoint. Rows after `resume_step` (None: all) are removed. Only process 0 writes. `loggers` is
  `config.logging`; a service that fails later is dropped with a warning.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    resume_step: int | None = None,
    loggers: Sequence[str] = ("tensorboard",),
  ):
    self._enabled = is_primary()
    self._futures: list[concurrent.futures.Future[None]] = []
    if not self._enabled:
      return
    self._bucket = _Bucket(workdir) if "://" in os.fspath(workdir) else None
    self._workdir = self._bucket.local if self._bucket else pathlib.Path(workdir)
    last_step = -1 if resume_step is None else resume_step
    options = {"folder": "." if self._bucket else str(workdir), "resume": resume_step is not None}
    with self._disk_errors():
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._services = open_services(loggers, epath.Path(workdir), **options)
      path = self._workdir / METRICS_FILE
      if path.exists():
        lines = [line + b"\n" for line, row in _read_rows(path) if row["step"] <= last_step]
        if (content := b"".join(lines)) != path.read_bytes():
          disk.write(path, content)
      self._file = path.open("a", encoding="utf-8")
      self._tensorboard = None
      if "tensorboard" in loggers:
        number = len(list(epath.Path(workdir).glob("events.out.tfevents.*")))
        self._tensorboard = EventFile(self._workdir, number=number, purge_step=last_step + 1)
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="metric_writer")

  def __exit__(self, kind: object, *_: object) -> None:
    self.close(failed=kind is not None)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers and scalar arrays by name; does not block on those still being computed."""
    self._submit(self._write_scalars, step, dict(scalars))

  def write_figures(
    self, step: int, figures: Mapping[str, Figure], best_step: int | None = None
  ) -> None:
    """Writes figures, by name, and closes them; removes those of steps before, but the best."""
    for name, pixels in _render_each(figures):  # here: matplotlib is not thread-safe
      self._submit(self._write_image, step, name, pixels, best_step)

  def write_config(self, config: Mapping[str, Any]) -> None:
    """Writes the config: as text, and nested fields as "optimizer.learning_rate"."""
    self._submit(self._write_config, dict(config))

  def flush(self) -> None:
    """Writes everything to disk, before a checkpoint; raises OSError, also of earlier writes."""
    if not self._enabled:
      return
    futures, self._futures = self._futures, []
    with self._disk_errors():
      for future in futures:
        future.result()
      self._file.flush()
      if self._tensorboard:
        self._tensorboard.flush()
      if self._bucket:
        self._bucket.upload()

  def close(self, *, failed: bool = False) -> None:
    """Flushes and closes the files, and the services' runs as finished or failed."""
    if not self._enabled:
      return
    try:
      self.flush()
    finally:
      self._enabled = False
      self._pool.shutdown()
      with self._disk_errors(), contextlib.ExitStack() as stack:  # each, also if another one raises
        for part in (self._bucket, self._tensorboard, self._file):
          if part:
            stack.callback(part.close)
        self._send("close", int(failed))

  def _submit(self, write: Callable[..., None], *args: Any) -> None:
    if self._enabled:
      self._futures = [f for f in self._futures if not f.done() or f.exception()]
      self._futures.append(self._pool.submit(write, *args))

  def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
    advice = "free disk space and run the same command again; it resumes at the last checkpoint"
    return disk.explained(f"the log cannot be written to {self._workdir}", lambda: advice)

  def _write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    values = {name: _as_float(name, value) for name, value in scalars.items()}
    safe = {k: v if math.isfinite(v) else _NOT_FINITE[str(v)] for k, v in values.items()}
    self._file.write(json.dumps({"step": step} | safe, allow_nan=False) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._add(step, tag=name, simple_value=value)
    if self._tensorboard:
      self._tensorboard.flush()
    self._send("scalars", step, values)

  def _write_image(self, step: int, name: str, pixels: np.ndarray, best_step: int | None) -> None:
    path = _figure_path(self._workdir, step, name)
    png = _save_image(path, pixels)
    kept = {path, _figure_path(self._workdir, best_step or 0, name)}
    for old in set(path.parent.glob(f"{glob.escape(path.name[:-12])}{'[0-9]' * 8}.png")) - kept:
      old.unlink()
    self._send("image", step, name, pixels)
    height, width, colorspace = pixels.shape
    fields = {"height": height, "width": width, "colorspace": colorspace}
    self._add(step, tag=name, image=Summary.Image(**fields, encoded_image_string=png))

  def _add(self, step: int, **value: Any) -> None:
    if self._tensorboard:
      self._tensorboard.write(summary=Summary(value=[Summary.Value(**value)]), step=step)

  def _write_config(self, config: dict[str, Any]) -> None:
    flat, plain = traverse_util.flatten_dict(config, sep="."), bool | int | float
    values = {k: v if isinstance(v, plain) else escape_surrogates(str(v)) for k, v in flat.items()}
    self._send("hparams", values)
    if self._tensorboard:
      text = f"```\n{json.dumps(config, indent=1)}\n```"
      metadata = create_summary_metadata(display_name="config", description="")
      self._add(0, tag="config/text_summary", metadata=metadata, tensor=make_tensor_proto(text))
      self._tensorboard.write(summary=hparams_pb(values))

  def _send(self, kind: str, *args: Any) -> None:
    for name, service in list(self._services.items()):
      try:
        getattr(service, kind)(*args)
      except Exception as error:
        del self._services[name]
        text = "%s: %s; the run continues and is no longer logged there"
        logging.warning(text, name, one_line(str(error)))


class _Bucket:
  """A local directory, uploaded to a remote one."""

  def __init__(self, remote: str | os.PathLike[str]):
    self._remote = epath.Path(remote)
    self._directory = tempfile.TemporaryDirectory(prefix="metrics_")
    self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
    self.local = pathlib.Path(self._directory.name)
    if (self._remote / METRICS_FILE).exists():
      (self.local / METRICS_FILE).write_bytes((self._remote / METRICS_FILE).read_bytes())

  def upload(self) -> None:
    for path in self.local.rglob("*"):
      stat = path.stat()
      version = (stat.st_mtime_ns, stat.st_size)
      if path.is_dir() or self._uploaded.get(path) == version:
        continue
      target = self._remote / path.relative_to(self.local)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
      self._uploaded[path] = version
    for path in [path for path in self._uploaded if not path.exists()]:  # figures of steps before
      del self._uploaded[path]
      (self._remote / path.relative_to(self.local)).unlink(missing_ok=True)

  def close(self) -> None:
    self.upload()
    self._directory.cleanup()


def save_figures(workdir: str | os.PathLike[str], step: int, figures: Mapping[str, Figure]) -> None:
  """Writes figures to a run's directory."""
  for name, pixels in _render_each(figures):
    path = _figure_path(workdir, step, name)
    with disk.explained(f"{path} cannot be written"):
      _save_image(path, pixels)


def _render_each(figures: Mapping[str, Figure]) -> Iterator[tuple[str, np.ndarray]]:
  for name, figure in figures.items():
    try:
      yield name, render(figure)
    except Exception as error:  # scores and training are worth more than any figure
      logging.warning("figure %s cannot be drawn: %s: %s", name, type(error).__name__, error)
    finally:
      plt.close(figure)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a run's `metrics.jsonl`, oldest first; all values but `step` are floats.

  Incomplete rows of an interrupted run are dropped.
  """
  return [row for _, row in _read_rows(epath.Path(workdir) / METRICS_FILE)]


def _read_rows(path: epath.Path | pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """Returns lines and their values (null is NaN); drops damaged lines with a warning."""
  rows, damaged = [], []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      row = json.loads(line.decode())
      values = {k: math.nan if v is None else float(v) for k, v in row.items()}
      rows.append((line, values | {"step": int(row["step"])}))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
      damaged.append(str(number))
  if damaged:
    logging.warning("%s: damaged rows dropped: lines %s", path, ", ".join(damaged[:5]))
  return rows


def _as_float(name: str, value: Any) -> float:
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"metric {name!r}: shape {array.shape}; expected a single number")
  return float(array.reshape(()))


def _figure_path(workdir: epath.PathLike, step: int, name: str) -> epath.Path:
  return epath.Path(workdir) / FIGURES / f"{name}_{step:08d}.png"


def _save_image(path: epath.Path, pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="png")
  path.parent.mkdir(parents=True, exist_ok=True)
  disk.write(path, buffer.getvalue())
  return buffer.getvalue()
