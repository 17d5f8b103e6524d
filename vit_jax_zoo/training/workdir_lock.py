"""Lock of a run's directory: a second run in the same directory raises an error.

The owner rewrites `<workdir>/lock.json` every `HEARTBEAT` seconds. A lock is stale if its process
has ended, or, on another host, if no heartbeat is written for three times as long.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from vit_jax_zoo.training import disk
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary

LOCK_FILE = "lock.json"
HEARTBEAT = 15.0  # seconds


class LockedError(ValueError):
  """Another run uses the directory."""


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path) -> Iterator[None]:
  """Holds the lock of a directory; called by all processes, which all raise LockedError."""
  path = workdir / LOCK_FILE
  try:
    with disk.explained(f"{path} cannot be written"):
      problem = _acquire(path) if is_primary() else None
  except (NotADirectoryError, FileExistsError):
    problem = f"--workdir={workdir}: not a folder; expected a run's folder, or a new one"
  if problem := all_gather_objects(problem)[0]:
    raise LockedError(problem)
  if not is_primary():
    yield
    return
  stop = threading.Event()
  thread = threading.Thread(target=_beat, args=(path, stop), daemon=True, name="workdir_lock")
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
    if _process().items() <= (_read(path) or {}).items():
      path.unlink(missing_ok=True)
    if workdir.exists() and not any(workdir.iterdir()):  # the run has written nothing
      workdir.rmdir()


_FIELDS = {"host", "pid", "started", "beats", "machine", "process_start"}


def _acquire(path: epath.Path) -> str | None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # buckets and some network disks have no such locks
      folder = os.open(path.parent, os.O_RDONLY)
      stack.callback(os.close, folder)
      fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed: one process or thread at a time
    if (owner := _read(path)) is not None:
      process = f"process {owner['pid']} on {owner['host']}"
      if _is_alive(path, owner):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
        return (
          f"{path.parent}: in use by {process} since {since}; use another --workdir, or stop that "
          f"run (if it has ended, remove {path})"
        )
      logging.info("removing the lock of %s, which ended", process)
    _write(path, time.time(), 0)
    return None


def _is_alive(path: epath.Path, owner: dict[str, Any]) -> bool:
  if owner["machine"] == _machine():
    return _process_start(owner["pid"]) == owner["process_start"]
  logging.info("%s: waiting for a heartbeat of process %s on %s", path, owner["pid"], owner["host"])
  deadline = time.monotonic() + 3 * HEARTBEAT
  while time.monotonic() < deadline:
    time.sleep(HEARTBEAT / 15)
    if (now := _read(path)) is None or now["beats"] != owner["beats"]:
      return now is not None
  return False


def _beat(path: epath.Path, stop: threading.Event) -> None:
  started, beats = time.time(), 0
  while not stop.wait(HEARTBEAT):
    beats += 1
    with contextlib.suppress(OSError):  # a full disk: the next save reports it
      _write(path, started, beats)


def _process() -> dict[str, Any]:
  pid = os.getpid()
  return {"pid": pid, "machine": _machine(), "process_start": _process_start(pid)}


def _write(path: epath.Path, started: float, beats: int) -> None:
  content = {"host": socket.gethostname(), "started": started, "beats": beats, **_process()}
  disk.write_json(path, content)


def _read(path: epath.Path) -> dict[str, Any] | None:
  """Returns the content of the lock; None if it is missing or invalid."""
  try:
    content = json.loads(path.read_text())
    is_valid = content.keys() >= _FIELDS and isinstance(content["pid"], int)
    return content if is_valid and 0 <= content["started"] < 1 << 36 else None
  except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError):
    return None


def _machine() -> str:
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _process_start(pid: int) -> str | None:
  with contextlib.suppress(OSError):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
  if pathlib.Path("/proc").is_dir():
    return None
  try:  # macOS: no start time
    os.kill(pid, 0)
  except OSError as error:
    return "running" if isinstance(error, PermissionError) else None
  return "running"
