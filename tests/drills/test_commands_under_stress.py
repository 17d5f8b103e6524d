"""Drills of the training command: full disk, damaged images, non-finite numbers."""

import os
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest

from tests import command
from vit_jax_zoo.training.checkpoint import find_checkpoint, restore_variables

pytestmark = pytest.mark.slow

RUN = (
  *command.TINY,
  "--config.num_steps=6",
  "--config.eval_every=0",
  "--config.checkpoint.every=3",
  "--config.model.width=128",
  "--config.model.mlp_dim=128",
)
LONGER = (*RUN, "--config.num_steps=12", "--allow_config_change")


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 32 MB."""
  place = tmp_path / "disk"
  place.mkdir()
  options = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
  if sys.platform != "linux" or os.geteuid() != 0:
    pytest.skip("mounting a small file system takes root on Linux")
  mounted = subprocess.run(options, capture_output=True, text=True)
  if mounted.returncode:
    pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
  yield place
  subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk, leave):
  """Writes until only `leave` bytes are free; returns the file."""
  filler = disk / "filler"
  stat = os.statvfs(disk)
  free = stat.f_bavail * stat.f_frsize - leave
  filler.write_bytes(b"\0" * free)
  return filler


def error_line(output):
  """Returns the one-line error of a failed command: its last line."""
  lines = output.splitlines()
  assert [line for line in lines if line.startswith("error: ")] == lines[-1:], output
  return lines[-1]


def bits(workdir):
  return restore_variables(find_checkpoint(workdir / "checkpoints"))["params"]


def test_full_disk_keeps_last_checkpoint(small_disk):
  workdir = small_disk / "run"
  command.run(workdir, *RUN)
  good = bits(workdir)
  # The state is about 2 MB; logs and figures still fit.
  filler = fill(small_disk, leave=800_000)
  output = command.run(workdir, *LONGER, expect=2)
  assert "No space left on device; that of step 6 is complete" in error_line(output)
  assert "Traceback" not in output
  assert find_checkpoint(workdir / "checkpoints").name == "6"
  jax.tree.map(np.testing.assert_array_equal, bits(workdir), good)
  filler.unlink()
  filler = fill(small_disk, leave=0)
  output = command.run(workdir, *LONGER, expect=2)
  assert "lock.json cannot be written: No space left on device" in error_line(output)
  assert "Traceback" not in output
  filler.unlink()
  output = command.run(workdir, *LONGER)
  assert "resumed at step 6 " in output
  assert "done after 12 steps" in output


def write_image_folder(folder, count=400, broken=0.01):
  """Writes JPEGs of two classes, every hundredth truncated; returns the number of those."""
  rng, truncated = np.random.default_rng(0), 0
  for i in range(count):
    place = folder / ("cat", "dog")[i % 2] / f"{i}.jpg"
    place.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(place), rng.integers(0, 255, (16, 16, 3), np.uint8))
    if i % round(1 / broken) == 7:
      place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
      truncated += 1
  return truncated


def test_truncated_images_raise_or_skipped(tmp_path):
  truncated = write_image_folder(tmp_path / "images")
  assert truncated == 4
  data = (
    "--config.num_steps=50",  # two epochs of 400 images
    "--config.data.train.source=folder:" + str(tmp_path / "images"),
    "--config.data.train.split=train[:100%]+test",
    "--config.data.eval.test.source=folder:" + str(tmp_path / "images"),
    "--config.data.eval.test.split=train[:100%]+test",
    "--config.model.num_classes=2",
    "--config.task.num_classes=2",
    "--config.task.class_names=['cat','dog']",
    "--config.data.train.transforms=[{'name':'resize','size':8}]",
    "--config.data.eval.test.transforms=[{'name':'resize','size':8}]",
  )
  error = error_line(command.run(tmp_path / "a", *command.TINY, *data, expect=2))
  assert "corrupt example" in error
  assert ".jpg" in error
  assert "on_corrupt='skip'" in error
  output = command.run(tmp_path / "b", *command.TINY, *data, "--config.data.loader.on_corrupt=skip")
  assert "done after 50 steps" in output
  rows = command.rows(tmp_path / "b")
  assert rows[-1]["test/skipped_images"] == truncated
  # Two epochs, plus possibly part of the third in prefetched batches.
  assert 2 * truncated <= max(row.get("data/skipped_images", 0) for row in rows) <= 3 * truncated


def test_nonfinite_parameters_never_saved(tmp_path):
  workdir = tmp_path / "run"
  command.run(workdir, *RUN)
  good = bits(workdir)
  wild = "--config.optimizer.learning_rate=1e30"
  error = error_line(command.run(workdir, *LONGER, wild, expect=2))
  assert "not finite" in error or "nan" in error or "inf" in error
  assert "the last checkpoint is of step 6" in error
  assert find_checkpoint(workdir / "checkpoints").name == "6"
  jax.tree.map(np.testing.assert_array_equal, bits(workdir), good)
  assert "done after 12 steps" in command.run(workdir, *LONGER)
