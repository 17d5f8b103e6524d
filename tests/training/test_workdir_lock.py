"""The lock of a run's directory: one run at a time; locks of ended processes are ignored."""

import concurrent.futures
import json
import os
import time

import pytest
from etils import epath

from tests.training.disk import small_files
from vit_jax_zoo.training import workdir_lock
from vit_jax_zoo.training.workdir_lock import LOCK_FILE, LockedError


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path) / "run"


def change_lock(workdir, **fields):
  path = workdir / LOCK_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_second_run_raises_with_pid(workdir):
  with workdir_lock.workdir_lock(workdir):
    with (
      pytest.raises(LockedError, match=rf"{workdir}: .* {os.getpid()} .*--workdir") as error,
      workdir_lock.workdir_lock(workdir),
    ):
      pass
    assert "\n" not in str(error.value)
    assert (workdir / LOCK_FILE).exists()
  assert not workdir.exists()
  with workdir_lock.workdir_lock(workdir):
    (workdir / "metrics.jsonl").write_text("")
  assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]


def test_one_of_several_threads_acquires(workdir, monkeypatch):
  write = workdir_lock._write
  monkeypatch.setattr(workdir_lock, "_write", lambda *a: (time.sleep(0.1), write(*a)))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    problems = list(pool.map(workdir_lock._acquire, [workdir / LOCK_FILE] * 4))
  assert problems.count(None) == 1


def test_lock_of_another_process_is_kept(workdir):
  with workdir_lock.workdir_lock(workdir):
    change_lock(workdir, pid=1)
  assert json.loads((workdir / LOCK_FILE).read_text())["pid"] == 1


@pytest.mark.parametrize(
  "fields",
  [{"pid": 2**22 + 1}, {"process_start": "1"}],
  ids=["ended", "another process with the same id"],
)
def test_ended_process_lock_replaced(workdir, fields):
  with workdir_lock.workdir_lock(workdir):
    change_lock(workdir, **fields)
    with workdir_lock.workdir_lock(workdir):
      assert json.loads((workdir / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_full_disk_error_names_lock(workdir):
  refused = pytest.raises(
    OSError, match=rf"{workdir}/{LOCK_FILE} cannot be written: File too large"
  )
  with small_files(10), refused, workdir_lock.workdir_lock(workdir):
    pass


@pytest.mark.parametrize(
  "damage",
  ['{"host"', "[1]", "[" * 100_000, {"started": "x"}, {"started": 1e400}, {"pid": [1]}],
  ids=["cut short", "a list", "nested", "time as text", "infinite time", "no process id"],
)
def test_damaged_lock_replaced(workdir, damage):
  with workdir_lock.workdir_lock(workdir):
    held = json.loads((workdir / LOCK_FILE).read_text())
  workdir.mkdir()
  text = damage if isinstance(damage, str) else json.dumps(held | damage).replace("inf", "1e400")
  (workdir / LOCK_FILE).write_text(text)
  with workdir_lock.workdir_lock(workdir):
    assert json.loads((workdir / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("alive", [True, False])
def test_remote_lock_valid_while_heartbeats(workdir, monkeypatch, alive):
  monkeypatch.setattr(workdir_lock, "HEARTBEAT", 0.1)
  with workdir_lock.workdir_lock(workdir):
    held = json.loads((workdir / LOCK_FILE).read_text())
  workdir.mkdir()
  (workdir / LOCK_FILE).write_text(json.dumps(held | {"machine": "another"}))
  if alive:
    read, beats = workdir_lock._read, iter(range(1, 100))
    monkeypatch.setattr(workdir_lock, "_read", lambda p: read(p) | {"beats": next(beats)})
    with pytest.raises(LockedError), workdir_lock.workdir_lock(workdir):
      pass
  else:
    with workdir_lock.workdir_lock(workdir):
      pass
