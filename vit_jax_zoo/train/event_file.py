"""A file that TensorBoard reads, written by whoever calls.

tensorboardX's own writer hands events to a thread, by a queue of ten. Its `flush` does not wait for
them, and a full disk ends the thread with a traceback; the eleventh event after it waits forever.
"""

import os
import pathlib
import socket
import time

# protobuf makes these classes when they are imported.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore
from tensorboardX.record_writer import RecordWriter

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
