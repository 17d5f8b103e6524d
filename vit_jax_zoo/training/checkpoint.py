"""Checkpoints of runs (Orbax): saving, restoring on any mesh, integrity.

    <workdir>/checkpoints/<step>/   state: the train state
    <workdir>/best/<step>/          variables: those with the best score;  metadata: the score

A background thread writes the arrays, and a manifest with size and checksum of every file, which
every restore verifies, into a temporary directory, which is then renamed. Older checkpoints are
deleted only after a newer one is complete. All processes of a run call each function.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from flax import traverse_util

from vit_jax_zoo.tasks.base import Variables
from vit_jax_zoo.training import disk
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary

PathLike: TypeAlias = str | os.PathLike[str]
Leaves: TypeAlias = Mapping[str, Any]  # arrays or their shapes, by path

CHECKPOINTS, BEST = "checkpoints", "best"
STATE, VARIABLES, METADATA = "state", "variables", "metadata"
MANIFEST = "files.json"
ORBAX_METADATA = "_CHECKPOINT_METADATA"  # written when a folder is created, and when it is complete

_BLOCK = 1 << 26  # bytes
_WEIGHTS = np.full(512, 0x9E3779B97F4A7C15, "<u8").cumprod()  # all odd
_CHECKSUMS = "checksums"  # key of the manifest


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
  """Saves and restores the state of one run, and the variables with the best score.

  A context manager, which waits for saves in progress at its end. The first save creates the
  directories and deletes incomplete checkpoints; the `keep` newest are kept. Saving raises OSError,
  in this save or the next, if the disk is full. `best_mode` is "max" or "min".
  """

  def __init__(self, workdir: PathLike, *, keep: int = 1, best_mode: str = "max"):
    self.workdir, self._best_mode = absolute(workdir), best_mode
    policy = ocp.checkpoint_managers.LatestN(keep)
    self._newest = _Folder(self.workdir / CHECKPOINTS, preservation_policy=policy)
    newest = max(steps(self.workdir / BEST), default="")
    advice = "remove this folder; the next evaluation selects the best again"
    score = operator.itemgetter("score")
    policy = ocp.checkpoint_managers.BestN(get_metric_fn=score, reverse=best_mode == "min", n=1)
    with _damage_reported(self.workdir / BEST / str(newest), lambda: advice):
      self._best = _Folder(
        self.workdir / BEST, preservation_policy=policy, best_fn=score, best_mode=best_mode
      )
      metrics = None if self.best_step is None else self._best.manager.metrics(self.best_step)
    self.best_score = None if metrics is None else float(metrics["score"])

  def __exit__(self, *_: object) -> None:
    self.wait()
    self._newest.manager.close()
    self._best.manager.close()

  @property
  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return self._newest.manager.latest_step()

  def save(self, step: int, state: Any) -> bool:
    """Starts to save the state, which may then be donated; returns False if the step is on disk."""
    saved = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)})
    with self._disk_errors():
      self._newest.wait()
      if step in self._newest.manager.all_steps():
        return False
      return self._newest.save(step, args=saved)

  def restore(self, abstract_state: Any) -> Any | None:
    """Returns the newest complete checkpoint, or None if there is none.

    The mesh of the shardings in `abstract_state` may differ from the one that saved. ValueError if
    names, shapes or dtypes differ from those saved, or the checkpoint is damaged.
    """
    if (step := self.latest_step) is None:
      return None
    directory = self.workdir / CHECKPOINTS / str(step)
    verify(directory, self._advice)
    with _damage_reported(directory, self._advice):
      saved = _saved_arrays(directory / STATE)
    what = f"{directory}: does not fit this run's state (remove it if it is another run's)"
    _check_fits(_by_path(abstract_state), saved, saved, what, with_dtype=True)
    arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})
    with _damage_reported(directory, self._advice):
      return self._newest.manager.restore(step, args=arguments)[STATE]

  def _advice(self) -> str:
    if earlier := sorted(self._newest.manager.all_steps())[:-1]:
      return f"remove this folder; the same command then resumes at step {earlier[-1]}"
    best = self.best_step
    start = "" if best is None else f" (or use --config.init_from={self.workdir / BEST}/{best})"
    return f"no earlier step: remove this folder; the run then starts from scratch{start}"

  @property
  def best_step(self) -> int | None:
    """Step of the best checkpoint, if any."""
    return self._best.manager.best_step()

  def save_best(self, step: int, variables: Any, score: float | int) -> bool:
    """Saves the variables if the score, equal on all processes, is the best; returns whether."""
    self.wait()  # in several processes, barriers of two saves at once would mix
    sign = 1 if self._best_mode == "max" else -1
    is_better = self.best_score is None or sign * score > sign * self.best_score
    if not (math.isfinite(score) and is_better):
      return False
    self.best_score = score = float(score)
    metadata = ocp.args.JsonSave({"score": score, "best_mode": self._best_mode})
    saved = ocp.args.Composite(**{VARIABLES: ocp.args.StandardSave(variables), METADATA: metadata})
    with self._disk_errors():
      return self._best.save(step, args=saved, metrics={"score": score})

  def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
    def advice() -> str:
      step = max(steps(self.workdir / CHECKPOINTS), default=None)
      last = "none is complete yet" if step is None else f"that of step {step} is complete"
      return f"{last}: free disk space and run the same command again"

    return disk.explained(f"a checkpoint cannot be written to {self.workdir}", advice)

  def wait(self) -> None:
    """Waits until all saves are complete on disk; raises their errors."""
    with self._disk_errors():
      self._newest.wait()
      if self._best.wait():
        self.best_score = None


class _Folder:
  """A directory of checkpoints, with Orbax's `manager`. Not changed before the first `save`."""

  def __init__(self, directory: epath.Path, **options: Any) -> None:
    self._directory, self._options, self._writable = directory, options, False
    self._step = 0
    self.manager = self._open(create=False)

  def save(self, step: int, **arguments: Any) -> bool:
    if not self._writable:
      self.manager.close()
      self.manager = self._open(cleanup_tmp_directories=True)
      self._writable = True
    if step in self.manager.all_steps():  # saved before an interruption
      self.manager.delete(step)
    self._step = step
    return self.manager.save(step, force=True, **arguments)

  def wait(self) -> bool:
    """Waits for a save; logs and returns whether checkpoints were removed from outside."""
    try:
      self.manager.wait_until_finished()
      saved = self.manager.all_steps() if self._writable and jax.process_count() == 1 else ()
      removed = set(saved) - set(steps(self._directory))
    except Exception as error:
      marks = (f"{self._step}{end}/{ORBAX_METADATA}" for end in ("", ".*"))
      exists = any(any(self._directory.glob(mark)) for mark in marks)
      if jax.process_count() > 1 or (exists and not isinstance(error, FileNotFoundError)):
        raise
      removed = {self._step}
    if removed:
      names = " and ".join(str(self._directory / str(step)) for step in sorted(removed))
      logging.error("%s: removed during the run, which continues and saves again", names)
      self.manager.reload()
    return bool(removed)

  def _open(self, **more: Any) -> ocp.CheckpointManager:
    # Orbax calls it in its thread when all files are written, before the directory is renamed.
    commit = ocp.AsyncOptions(post_finalization_callback=self._write_manifest)
    options = ocp.CheckpointManagerOptions(async_options=commit, **self._options, **more)
    handlers: dict[str, Any] = {x: ocp.StandardCheckpointHandler() for x in (STATE, VARIABLES)}
    handlers[METADATA] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

  def _write_manifest(self) -> None:
    if not is_primary() or "://" in os.fspath(self._directory):
      return
    for directory in self._directory.glob(f"{self._step}.*"):
      _check_complete(_item(directory))
      (directory / MANIFEST).write_text(json.dumps({_CHECKSUMS: _checksums(directory)}))


def restore_variables(
  path: PathLike, abstract_variables: Variables | None = None, *, left_out: Sequence[str] = ()
) -> dict[str, Any]:
  """Restores the variables (the moving averages, if there are any) of `find_checkpoint(path)`.

  `abstract_variables` are arrays or shapes of the result, with dtype and `sharding` (default: one
  device), ValueError if they do not fit; None: numpy arrays as saved. `left_out` are sub-trees by
  path ("params/head") that are not restored.
  """
  directory = find_checkpoint(path)
  advice = functools.partial(_others, directory)
  verify(directory, advice)
  item = _item(directory)
  with _damage_reported(directory, advice):
    saved = _saved_arrays(item)
  keys = _keys_in_state(saved) if item.name == STATE else {key: key for key in saved}
  arrays = {path: saved[key] for path, key in keys.items()}
  if abstract_variables is None:
    target = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in arrays}
  else:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default)
      for path, x in _by_path(abstract_variables).items()
    }
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    left = tuple(f"{part}/" for part in left_out)
    read = [path for path in arrays if not path.startswith(left)]
    _check_fits(target, arrays, read, f"{directory}: does not fit this model")
  like, restore_args = (
    traverse_util.unflatten_dict({keys[path]: flat[path] for path in target}, sep="/")
    for flat in (target, arguments)
  )
  with _damage_reported(directory, advice):
    partial = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(item, args=partial)
  restored = traverse_util.flatten_dict(restored, sep="/")
  return traverse_util.unflatten_dict({path: restored[keys[path]] for path in target}, sep="/")


def _keys_in_state(saved: Iterable[str]) -> dict[str, str]:
  """Returns the path of each variable within a saved train state, by its path in the variables."""
  if averages := {key.removeprefix("ema/"): key for key in saved if key.startswith("ema/")}:
    return averages
  params = {key: key for key in saved if key.startswith("params/")}
  return params | {k.removeprefix("model_state/"): k for k in saved if k.startswith("model_state/")}


def find_checkpoint(path: PathLike) -> epath.Path:
  """Returns the directory of one checkpoint: `path`, or a run's or folder's best, else newest."""
  root = absolute(path)
  if _is_single(root):
    return root
  for directory in (root / BEST, root / CHECKPOINTS, root):
    found = [directory / str(step) for step in sorted(steps(directory))]
    if len(found) > 1 and directory.name == BEST:  # an interruption can leave several
      return max(found, key=_signed_score)
    if found:
      return found[-1]
  raise FileNotFoundError(f"{root}: no complete checkpoint; expected a run's workdir or checkpoint")


def is_checkpoint(path: PathLike) -> bool:
  """Returns whether `path` is a run, or a checkpoint of one, and not a published file."""
  if str(path).startswith(("http://", "https://")):
    return False
  root = absolute(path)
  folders = (root / BEST, root / CHECKPOINTS, root)
  return root.is_dir() and (_is_single(root) or any(map(steps, folders)))


def _is_single(directory: epath.Path) -> bool:
  return (directory / STATE).exists() or (directory / VARIABLES).exists()


def steps(directory: epath.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder of them."""
  return list(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


def _others(directory: epath.Path) -> str:
  run = directory.parent.parent
  folders = [run / name / str(n) for name in (CHECKPOINTS, BEST) for n in steps(run / name)]
  found = [str(folder) for folder in folders if folder != directory]
  return f"use another: {', '.join(found)}" if found else "the run has no other"


def _signed_score(checkpoint: epath.Path) -> float:
  """Returns the score of a best checkpoint, negated if lower is better."""
  with _damage_reported(checkpoint, lambda: "remove this folder"):
    metadata = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(checkpoint / METADATA)
  return metadata["score"] if metadata["best_mode"] == "max" else -metadata["score"]


def absolute(path: PathLike) -> epath.Path:
  """Returns the absolute path, with "~" expanded, as Orbax requires."""
  return epath.Path(path).expanduser().absolute()


def verify(checkpoint: epath.Path, advice: Callable[[], str]) -> None:
  """Raises ValueError, ending with `advice()`, if files of a checkpoint differ from its manifest.

  Those without a manifest are not checked: of version 0.1, and in buckets, which have checksums.
  """
  if problem := all_gather_objects(_find_damage(checkpoint) if is_primary() else None)[0]:
    raise _damaged(checkpoint, problem, advice())


def _item(checkpoint: epath.Path) -> epath.Path:
  return checkpoint / (STATE if (checkpoint / STATE).exists() else VARIABLES)


def _check_complete(item: epath.Path) -> None:
  """Raises FileNotFoundError if files of arrays were removed; reads one byte of each chunk."""
  base = {"driver": "file", "path": f"{item}/"}
  with contextlib.suppress(ValueError):  # TensorStore's, of missing files
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    reads = [store.read(key, byte_range=slice(-1, None)) for key in store.list().result()]
    _saved_arrays(item)
    if reads and all(read.result().value for read in reads):
      return
  raise FileNotFoundError(f"{item}: files were removed while it was written")


def _find_damage(checkpoint: epath.Path) -> str | None:
  manifest = checkpoint / MANIFEST
  if "://" in os.fspath(checkpoint) or not manifest.exists():
    return None
  try:
    expected = {**json.loads(manifest.read_text())[_CHECKSUMS]}
  except (ValueError, KeyError, TypeError, RecursionError):
    return f"{MANIFEST} is not readable"
  if not expected:
    return f"{MANIFEST} lists no files"
  found = _checksums(checkpoint)
  for name, checksums in expected.items():
    if found.get(name) != checksums:
      return f"{name} {'has another checksum' if name in found else 'is missing'}"
  return None


def _checksums(directory: epath.Path) -> dict[str, list[int]]:
  """Returns the size, and the checksum of each block, of every file by path."""
  root = pathlib.Path(os.fspath(directory))
  other = (MANIFEST, ORBAX_METADATA)
  files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in other]
  found: dict[str, list[int]] = {}
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for path in files:
      size = path.stat().st_size
      sums = pool.map(functools.partial(_checksum, path), range(0, size, _BLOCK))
      found[str(path.relative_to(root))] = [size, *sums]
  return found


def _checksum(path: pathlib.Path, start: int) -> int:
  """Returns the CRC-32 of sums of 64-bit words, at half the time of a CRC-32 of all bytes."""
  # Sums of rows of 4 KiB are weighted by place; flips of highest bits cancel only in those.
  crc, buffer = 0, bytearray(1 << 18)
  words = np.frombuffer(buffer, "<u8").reshape(-1, 512)
  with path.open("rb") as file:
    file.seek(start)
    for _ in range(0, _BLOCK, len(buffer)):
      count = file.readinto(buffer)
      buffer[count:] = bytes(len(buffer) - count)
      crc = zlib.crc32(np.einsum("rc,c->r", words, _WEIGHTS), crc)
      crc = zlib.crc32(words.sum(axis=0), crc)
      if count < len(buffer):
        break
  return crc


def _damaged(checkpoint: epath.Path, reason: str, advice: str) -> ValueError:
  step = f" of step {checkpoint.name}" if checkpoint.name.isdigit() else ""
  return ValueError(f"the checkpoint{step} in {checkpoint} is damaged ({reason}); {advice}")


_MAX_REASON = 160
_DAMAGE = (FileNotFoundError, KeyError, EOFError, ValueError)


@contextlib.contextmanager
def _damage_reported(checkpoint: epath.Path, advice: Callable[[], str]) -> Iterator[None]:
  """Raises one line for errors of reading files that have no manifest; see `verify`."""
  try:
    yield
  except Exception as error:
    # Orbax wraps the error of an array in a plain Exception with pages of details.
    cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
    if type(cause) is not Exception and not isinstance(cause, _DAMAGE):
      raise
    raise _damaged(checkpoint, _end_of(cause, checkpoint), advice()) from None


def _end_of(error: BaseException, checkpoint: epath.Path) -> str:
  text = " ".join(str(error).replace(f"{checkpoint}/", "").split())
  text = text.partition(" [")[0].partition(". See full TensorStore details")[0]
  parts = text.split(": ")
  while len(parts) > 1 and len(": ".join(parts)) > _MAX_REASON:
    del parts[0]
  return ": ".join(parts)[:_MAX_REASON].rstrip(".")


def _check_fits(
  expected: Leaves, saved: Leaves, read: Iterable[str], what: str, *, with_dtype: bool = False
) -> None:
  """Raises ValueError unless the arrays of `read` are the expected ones; logs all at `-v=1`."""
  problems = []
  for key, leaf in expected.items():
    if key not in saved:
      problems.append(f"{key} is not in the checkpoint")
    elif tuple(leaf.shape) != tuple(saved[key].shape):
      problems.append(f"{key} has shape {tuple(saved[key].shape)}; expected {tuple(leaf.shape)}")
    elif with_dtype and leaf.dtype != saved[key].dtype:
      problems.append(f"{key} is {np.dtype(saved[key].dtype)}; expected {leaf.dtype}")
  problems += [f"{key} is only in the checkpoint" for key in read if key not in expected]
  if problems:
    logging.debug("%s", "\n".join(problems))
    more = f"; and {len(problems) - 4} more (-v=1 lists all)" if len(problems) > 4 else ""
    raise ValueError(f"{what}: {'; '.join(problems[:4])}{more}")


def _by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves by "/"-joined path: attributes, keys and indices alike, as Orbax does."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved_arrays(item: epath.Path) -> dict[str, Any]:
  return _by_path(ocp.PyTreeCheckpointHandler().metadata(item).tree)
