"""Checkpoints that are damaged, or find no place on the disk: one line, and how to go on.

States have one array: of several errors at once, Orbax leaves all but one to be printed by threads.
"""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.training.disk import small_files
from vit_jax_zoo.training.checkpoint import (
  MANIFEST,
  Checkpointer,
  _checksums,
  _Folder,
  find_checkpoint,
  is_checkpoint,
  restore_variables,
  verify,
)

STATE = {"params": {"x": jnp.arange(1000.0)}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run with checkpoints of steps 1 and 2, and the best of step 1."""
  workdir = tmp_path_factory.mktemp("whole")
  with Checkpointer(workdir, keep=2) as checkpointer:
    checkpointer.save_best(1, STATE, 0.5)
    checkpointer.save(1, STATE)
    checkpointer.save(2, STATE)
  return workdir


def damaged(whole, folder, pattern, how, manifest=True):
  """Returns a copy of a run in which all matching files are truncated, changed or removed."""
  shutil.copytree(whole, folder)
  files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
  assert files, "there is nothing to damage"
  for file in files:
    content = file.read_bytes()
    if how == "missing":
      file.unlink()
    elif how == "cut":
      file.write_bytes(content[:-9])
    else:
      middle = len(content) // 2
      file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
  if not manifest:  # a run of a version without manifests
    for file in folder.rglob("files.json"):
      file.unlink()
  return folder


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
  ("pattern", "how"),
  [
    ("checkpoints/2/state/manifest.ocdbt", "missing"),
    ("checkpoints/2/state/manifest.ocdbt", "cut"),
    ("checkpoints/2/state/_METADATA", "missing"),
    ("checkpoints/2/state/_METADATA", "cut"),
    ("checkpoints/2/state/d/*", "cut"),
    ("checkpoints/2/state/ocdbt.process_0/d/*", "missing"),
    ("checkpoints/2/state/**/*", "missing"),
  ],
)
def test_damaged_checkpoint_raises(whole, tmp_path, pattern, how, manifest):
  workdir = damaged(whole, tmp_path / "run", pattern, how, manifest)
  assert is_checkpoint(workdir)
  expected = rf"{workdir}/checkpoints/2 is damaged \(.*\); "
  with (
    Checkpointer(workdir) as checkpointer,
    pytest.raises(ValueError, match=rf"{expected}remove .* step 1$") as resumed,
  ):
    checkpointer.restore(STATE)
  with pytest.raises(ValueError, match=rf"{expected}use .*points/1, .*/best/1$") as read:
    restore_variables(workdir / "checkpoints")
  for error in (resumed, read):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + 4 * len(str(workdir))
  shutil.rmtree(workdir / "checkpoints" / "2")
  with Checkpointer(workdir) as checkpointer:
    np.testing.assert_array_equal(checkpointer.restore(STATE)["params"]["x"], STATE["params"]["x"])


@pytest.mark.parametrize(
  "pattern", ["checkpoints/2/state/d/*", "checkpoints/2/state/ocdbt.process_0/d/*"]
)
def test_flipped_bit_names_file(whole, tmp_path, pattern):
  workdir = damaged(whole, tmp_path / "run", pattern, "flipped")
  expected = r"step 2 .*\(state/\S+ .*checksum"
  with Checkpointer(workdir) as checkpointer, pytest.raises(ValueError, match=expected):
    checkpointer.restore(STATE)
  with pytest.raises(ValueError, match=expected):
    restore_variables(workdir / "checkpoints")


def test_checkpoint_without_manifest_restored(whole, tmp_path):
  workdir = damaged(whole, tmp_path / "run", "best/1/metrics/metrics", "missing", manifest=False)
  np.testing.assert_array_equal(
    restore_variables(workdir / "checkpoints")["params"]["x"], STATE["params"]["x"]
  )


def test_only_checkpoint_damaged_suggests_init_from(whole, tmp_path):
  workdir = damaged(whole, tmp_path / "run", "checkpoints/2/state/_METADATA", "cut")
  shutil.rmtree(workdir / "checkpoints" / "1")
  advice = r"--config.init_from=.*/best/1\)$"
  with Checkpointer(workdir) as checkpointer, pytest.raises(ValueError, match=advice):
    checkpointer.restore(STATE)


@pytest.mark.parametrize(
  ("pattern", "use", "advice"),
  [
    ("best/1/metrics/metrics", Checkpointer, "remove this folder; "),
    ("best/1/variables/_METADATA", restore_variables, "use .*points/2, .*points/1$"),
  ],
)
def test_damaged_best_raises(whole, tmp_path, pattern, use, advice):
  workdir = damaged(whole, tmp_path / "run", pattern, "cut")
  expected = rf"{workdir}/best/1 is damaged \(.*\); {advice}"
  with pytest.raises(ValueError, match=expected):
    use(workdir)


def test_other_errors_unchanged(whole, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError("you may not read this")

  monkeypatch.setattr("vit_jax_zoo.training.checkpoint._saved_arrays", refuse)
  with pytest.raises(PermissionError, match="you may not read this"):
    restore_variables(whole)


def test_full_disk_raises_and_save_again(tmp_path):
  noise = {"params": {"x": jax.random.normal(jax.random.key(0), (100_000,))}}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, noise)
  message = rf"{tmp_path}: File too large; .*step 1"
  with small_files(100_000), pytest.raises(OSError, match=message) as error:
    save_and_wait(tmp_path, 2, noise)
  assert "\n" not in str(error.value)
  save_and_wait(tmp_path, 2, noise)
  np.testing.assert_array_equal(restore_variables(tmp_path)["params"]["x"], noise["params"]["x"])


def save_and_wait(workdir, step, state):
  with Checkpointer(workdir) as checkpointer:
    checkpointer.save(step, state)


def test_removed_folders_logged_and_saved_again(tmp_path, caplog):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save_best(1, STATE, 0.5)
    checkpointer.save(1, STATE)
    checkpointer.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "best")
    checkpointer.save(2, STATE)
    checkpointer.save_best(2, STATE, 0.4)  # lower, but the better checkpoint was removed
  for folder in ("checkpoints", "best"):
    removed = [r.message for r in caplog.records if f"{tmp_path}/{folder}/1: removed" in r.message]
    assert len(removed) == 1
    restored = restore_variables(tmp_path / folder / "2")
    np.testing.assert_array_equal(restored["params"]["x"], STATE["params"]["x"])


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (OSError(errno.ENOSPC, "Full"), f"run: {os.strerror(errno.ENOSPC)}; none is complete yet"),
    (ValueError(f"Failed [os_error_code='{errno.EDQUOT}']"), os.strerror(errno.EDQUOT) + "; none"),
    (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
    (ValueError("something else"), "something else"),
  ],
)
def test_disk_errors_converted(tmp_path, error, message):
  with (
    Checkpointer(tmp_path / "run") as checkpointer,
    pytest.raises((OSError, ValueError), match=message),
    checkpointer._disk_errors(),
  ):
    raise error


@pytest.mark.parametrize(
  "content", ["[1]", "null", "{}", '{"checksums": 5}', '{"checksums": {}}', "[" * 100_000]
)
def test_invalid_or_empty_manifest_raises(tmp_path, content):
  (tmp_path / MANIFEST).write_text(content)
  with pytest.raises(ValueError, match=rf"is damaged \({MANIFEST}"):
    verify(epath.Path(tmp_path), lambda: "advice")


@pytest.mark.parametrize("at", [0, 4095, 2**18 - 1, 2**18, 2**19 + 8, 2**19 + 100])
def test_one_changed_byte_changes_its_block_checksum(tmp_path, monkeypatch, at):
  monkeypatch.setattr("vit_jax_zoo.training.checkpoint._BLOCK", 2**18)
  content = bytearray(np.random.default_rng(0).bytes(2**19 + 101))  # the last block is no page
  file = tmp_path / "a"
  file.write_bytes(content)
  size, *before = _checksums(epath.Path(tmp_path))["a"]
  content[at] ^= 1
  file.write_bytes(content)
  _, *after = _checksums(epath.Path(tmp_path))["a"]
  assert size == len(content)
  assert [b == a for b, a in zip(before, after, strict=True)] == [i != at >> 18 for i in range(3)]


@pytest.mark.parametrize("damage", ["bytes", "words", "reversed", "signs", "pages"])
def test_moved_bytes_change_the_checksum(tmp_path, damage):
  words = np.random.default_rng(0).integers(0, 2**63, 2**15, np.uint64)
  (tmp_path / "a").write_bytes(words.tobytes())
  before = _checksums(epath.Path(tmp_path))
  content = words.view(np.uint8)
  if damage == "bytes":
    content[[5000, 5008]] = content[[5008, 5000]]
  elif damage == "words":
    words[[600, 700]] = words[[700, 600]]
  elif damage == "reversed":
    words[512:1024] = words[512:1024][::-1].copy()
  elif damage == "signs":
    words[[600, 700]] ^= np.uint64(2**63)
  else:
    words[:1024] = np.roll(words[:1024], 512)
  (tmp_path / "a").write_bytes(words.tobytes())
  assert _checksums(epath.Path(tmp_path)) != before


@pytest.mark.parametrize(
  "files", ["", "/state", "/state/_METADATA", "/state/d/*", "/state/ocdbt.process_0/d/*"]
)
def test_files_removed_during_save_keep_the_previous_checkpoint(tmp_path, monkeypatch, files):
  saves = iter(range(3))

  def remove_files(folder):
    if next(saves) == 1:
      for path in tmp_path.glob(f"checkpoints/2.*{files}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_manifest(folder)

  write_manifest = _Folder._write_manifest
  monkeypatch.setattr(_Folder, "_write_manifest", remove_files)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, STATE)
    checkpointer.save(2, STATE)
    checkpointer.wait()
    assert checkpointer.latest_step == 1
    checkpointer.save(2, STATE)
  assert find_checkpoint(tmp_path).name == "2"
  np.testing.assert_array_equal(restore_variables(tmp_path)["params"]["x"], STATE["params"]["x"])


@pytest.mark.parametrize("removed", ["checkpoints", "checkpoints/1"])
def test_errors_of_removed_folders_continue_the_run(tmp_path, monkeypatch, caplog, removed):
  def fail(_):
    shutil.rmtree(tmp_path / removed)
    (tmp_path / "checkpoints/1/state/d").mkdir(parents=True)  # as TensorStore's next write does
    raise ValueError("an error of TensorStore or Orbax")

  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, STATE)
    checkpointer.wait()
    with monkeypatch.context() as patch:
      patch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", fail)
      checkpointer.wait()
    assert "checkpoints/1: removed" in caplog.text
    checkpointer.save(2, STATE)
  assert find_checkpoint(tmp_path).name == "2"


def test_other_errors_of_a_save_end_the_run(tmp_path, monkeypatch):
  def fail(_):
    raise ValueError("NOT_FOUND: but all files exist")

  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, STATE)
    checkpointer.wait()
    with monkeypatch.context() as patch:
      patch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", fail)
      with pytest.raises(ValueError, match="all files exist"):
        checkpointer.wait()
