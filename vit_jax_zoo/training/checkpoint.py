"""Checkpoints of runs (Orbax): saving, restoring on any mesh, integrity.

    <workdir>/checkpoints/<step>/   state: the train state
    <workdir>/best/<step>/          variables: those with the best score;  metadata: the score

A save returns once the arrays are copied off the devices. A background thread writes them, and a
manifest with size and CRC-32 of every file, into a temporary directory, which is then renamed. An
interrupted save is ignored, and deleted by the next save; older checkpoints are deleted only after
a newer one is complete. The manifest is verified at every restore. All processes of a multi-process
run call each function, and each writes its part.
"""

import concurrent.futures
import contextlib
import json
import math
import mmap
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from vit_jax_zoo.training import disk_errors
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary

PathLike: TypeAlias = str | os.PathLike[str]

CHECKPOINTS, BEST = "checkpoints", "best"
STATE, VARIABLES, METADATA = "state", "variables", "metadata"
MANIFEST = "files.json"
_UNCHECKED = (MANIFEST, "_CHECKPOINT_METADATA")  # Orbax adds the time of the commit to the second


class Checkpointer:
  """Saves and restores the state of one run, and the variables with the best score.

  Use it as a context manager: closing waits for saves in progress. Opening changes nothing on disk;
  the first save creates the directories and deletes incomplete checkpoints.

  Attributes:
    workdir: the run's directory.
    read_only: whether saving is an error.
    best_score: score of the best variables, also across interruptions; None without any.
  """

  def __init__(
    self,
    workdir: PathLike,
    *,
    keep: int = 1,
    best_mode: str = "max",
    read_only: bool = False,
  ):
    """Reads the steps and the best score that are on disk.

    Args:
      workdir: the run's directory; it need not exist.
      keep: number of the newest checkpoints to keep.
      best_mode: whether a higher ("max") or a lower ("min") score is better.
      read_only: saving raises an error.

    Raises:
      ValueError: `keep` is below 1 or `best_mode` unknown.
    """
    if keep < 1:
      raise ValueError(f"checkpoint.keep is {keep}; expected at least 1")
    if best_mode not in ("max", "min"):
      raise ValueError(f"checkpoint.best_mode is {best_mode!r}; expected 'max' or 'min'")
    self.workdir, self.read_only, self._best_mode = absolute(workdir), read_only, best_mode
    self._newest = _Folder(self.workdir / CHECKPOINTS, max_to_keep=keep)
    newest = max(steps(self.workdir / BEST), default="")
    advice = "remove this folder; the next evaluation selects the best again"
    with _damage_reported(self.workdir / BEST / str(newest), lambda: advice):
      self._best = _Folder(
        self.workdir / BEST,
        max_to_keep=1,
        best_fn=lambda metrics: metrics["score"],
        best_mode=best_mode,
      )
      best_step = self._best.manager.best_step()
      metrics = None if best_step is None else self._best.manager.metrics(best_step)
    self.best_score = None if metrics is None else float(metrics["score"])

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return self._newest.manager.latest_step()

  def save(self, step: int, state: Any) -> bool:
    """Starts to save the state after `step` training steps; returns False if it is there already.

    The state's arrays may be donated as soon as this returns.

    Args:
      step: training steps completed.
      state: a tree of arrays on the devices.

    Raises:
      RuntimeError: opened read-only.
      OSError: the disk is full; raised by this save or the next.
    """
    self._check_writable()
    if step in self._newest.manager.all_steps():
      return False
    saved = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)})
    with writing(self.workdir, self._newest.newest):
      return self._newest.save(step, args=saved)

  def restore(self, abstract_state: Any) -> Any | None:
    """Returns the newest complete checkpoint, or None if there is none.

    Args:
      abstract_state: the state, as arrays or `jax.ShapeDtypeStruct`s with a `sharding`; the mesh
        may differ from the one that saved.

    Raises:
      ValueError: names, shapes or dtypes differ from those saved, which the message lists; or the
        checkpoint is damaged.
    """
    step = self.latest_step
    if step is None:
      return None
    directory = self.workdir / CHECKPOINTS / str(step)
    verify(directory, self._advice)
    with _damage_reported(directory, self._advice):
      saved = _saved_arrays(directory / STATE)
    expected = _by_path(abstract_state)
    problems = [*_differences(expected, saved, with_dtype=True), *_unused(expected, saved)]
    _raise_if_any(problems, f"the checkpoint {directory} does not fit this run's state")
    arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})
    with _damage_reported(directory, self._advice):
      return self._newest.manager.restore(step, args=arguments)[STATE]

  def _advice(self) -> str:
    earlier = sorted(self._newest.manager.all_steps())[:-1]
    if earlier:
      return f"remove this folder; the same command then resumes at step {earlier[-1]}"
    best = self._best.manager.best_step()
    start = (
      "" if best is None else f" (or use --config.init_from={self.workdir / BEST / str(best)})"
    )
    return f"there is no earlier step: remove this folder; the run then starts from scratch{start}"

  def save_best(self, step: int, variables: Any, score: float | int) -> bool:
    """Saves the variables if the score is the best so far; returns whether it is.

    Every process must pass the same score. NaN and infinities are never the best.

    Raises:
      RuntimeError: opened read-only.
    """
    self._check_writable()
    if not self._is_better(score):
      return False
    self.best_score = score = float(score)
    saved = ocp.args.Composite(
      **{
        VARIABLES: ocp.args.StandardSave(variables),
        METADATA: ocp.args.JsonSave({"score": score, "best_mode": self._best_mode}),
      }
    )
    with writing(self.workdir, self._newest.newest):
      if jax.process_count() > 1:  # barriers of two saves at once would mix
        self._newest.manager.wait_until_finished()
      return self._best.save(step, args=saved, metrics={"score": score})

  def _check_writable(self) -> None:
    if self.read_only:
      raise RuntimeError(f"the checkpoints in {self.workdir} were opened read-only")

  def _is_better(self, score: float | int) -> bool:
    if not math.isfinite(score) or self.best_score is None:
      return math.isfinite(score)
    return score > self.best_score if self._best_mode == "max" else score < self.best_score

  def wait(self) -> None:
    """Waits until all saves are complete on disk; raises their errors."""
    with writing(self.workdir, self._newest.newest):
      self._newest.manager.wait_until_finished()
      self._best.manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and stops the background threads."""
    self.wait()
    self._newest.manager.close()
    self._best.manager.close()


class _Folder:
  """A directory of checkpoints. It is not changed before the first `save`.

  Attributes:
    manager: Orbax's, of the complete checkpoints.
  """

  def __init__(self, directory: epath.Path, **options: Any) -> None:
    self._directory, self._options, self._writable = directory, options, False
    self._step = 0
    self.manager = self._open(create=False)

  def save(self, step: int, **arguments: Any) -> bool:
    """Starts to save; creates the directory and deletes incomplete checkpoints before."""
    if not self._writable:
      self.manager.close()
      self.manager = self._open(cleanup_tmp_directories=True)
      self._writable = True
    self.manager.wait_until_finished()
    if step in self.manager.all_steps():  # saved before an interruption
      self.manager.delete(step)
    self._step = step
    return self.manager.save(step, force=True, **arguments)

  def newest(self) -> int | None:
    """Returns the newest step that is complete on disk."""
    return max(steps(self._directory), default=None)

  def _open(self, **options: Any) -> ocp.CheckpointManager:
    # Orbax calls it in its thread when all files are written, before the directory is renamed.
    commit = ocp.AsyncOptions(post_finalization_callback=self._write_manifest)
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(async_options=commit, **self._options, **options),
      item_handlers={
        STATE: ocp.StandardCheckpointHandler(),
        VARIABLES: ocp.StandardCheckpointHandler(),
        METADATA: ocp.JsonCheckpointHandler(),
      },
    )

  def _write_manifest(self) -> None:
    if not is_primary() or _is_remote(self._directory):
      return
    for directory in self._directory.glob(f"{self._step}.*"):
      content = json.dumps({"crc32": _checksums(directory)}, indent=1)
      (directory / MANIFEST).write_text(content)


def restore_variables(
  path: PathLike,
  abstract_variables: Mapping[str, Any] | None = None,
  *,
  prefer_best: bool = True,
  use_ema: bool = True,
  left_out: Sequence[str] = (),
) -> dict[str, Any]:
  """Restores parameters and model state, without the rest, from a run or a single checkpoint.

  Args:
    path: a run's workdir, its `checkpoints` or `best` directory, or one step's directory in there.
    abstract_variables: `params` and the model's other collections, as arrays or
      `jax.ShapeDtypeStruct`s; each leaf is restored into its dtype and onto its `sharding` (one
      device of this process, if it has none). None gives numpy arrays, as they were saved.
    prefer_best: restore the best variables of a workdir that has some; else the newest checkpoint.
    use_ema: restore the averaged variables, if there are any.
    left_out: sub-trees by path ("params/head") that are not restored when `abstract_variables` are
      given.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: parameters are missing, unused or of another shape, which the message lists; or the
      checkpoint is damaged.
  """
  directory = find_checkpoint(path, prefer_best=prefer_best)
  verify(directory, lambda: _others(directory))
  item = directory / (STATE if (directory / STATE).exists() else VARIABLES)
  with _damage_reported(directory, lambda: _others(directory)):
    saved = _saved_arrays(item)
  names = _collections(saved, use_ema=use_ema) if item.name == STATE else {}
  expected = abstract_variables
  if expected is None:
    expected = _abstract_from(saved, names)
  else:
    by_path = {_renamed(key, names): leaf for key, leaf in _by_path(expected).items()}
    left = tuple(_renamed(f"{part}/", names) for part in left_out)
    here = {k: x for k, x in saved.items() if item.name != STATE or _in(k, names)}
    here = {key: leaf for key, leaf in here.items() if not key.startswith(left)}
    problems = [*_differences(by_path, saved, with_dtype=False), *_unused(by_path, here)]
    _raise_if_any(problems, f"the checkpoint {directory} does not fit this model")
  with _damage_reported(directory, lambda: _others(directory)):
    return _read(item, expected, names, as_numpy=abstract_variables is None)


def find_checkpoint(path: PathLike, *, prefer_best: bool = True) -> epath.Path:
  """Returns the directory of one complete checkpoint: `path` itself, or the newest below it.

  Raises:
    FileNotFoundError: there is none.
  """
  root = absolute(path)
  if _is_one(root):
    return root
  order = (BEST, CHECKPOINTS) if prefer_best else (CHECKPOINTS, BEST)
  for directory in (*(root / name for name in order), root):
    found = steps(directory)
    if len(found) > 1 and directory.name == BEST:
      return directory / str(max(found, key=_best_first(directory)))
    if found:
      return directory / str(max(found))
  raise FileNotFoundError(
    f"no complete checkpoint in {root}; give a run's workdir (with {CHECKPOINTS}/ or {BEST}/), "
    "or the directory of one checkpoint"
  )


def is_checkpoint(path: PathLike) -> bool:
  """Returns whether `path` is a run, or a checkpoint of one, and not a published file."""
  if str(path).startswith(("http://", "https://")):
    return False
  root = absolute(path)
  folders = (root / BEST, root / CHECKPOINTS, root)
  return root.is_dir() and (_is_one(root) or any(map(steps, folders)))


def _is_one(directory: epath.Path) -> bool:
  return (directory / STATE).exists() or (directory / VARIABLES).exists()


def steps(directory: epath.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder of them."""
  return list(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


def _others(directory: epath.Path) -> str:
  """Returns advice: the other checkpoints of the run."""
  run = directory.parent.parent
  folders = [run / name / str(n) for name in (CHECKPOINTS, BEST) for n in steps(run / name)]
  found = [str(folder) for folder in folders if folder != directory]
  return f"use another: {', '.join(found)}" if found else "there is no other beside it"


def _best_first(directory: epath.Path) -> Callable[[int], float]:
  """Returns a sort key of steps, by score: an interruption can leave several best ones."""

  def score(step: int) -> float:
    folder = directory / str(step)
    with _damage_reported(folder, lambda: "remove this folder"):
      found = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / METADATA)
    return found["score"] if found["best_mode"] == "max" else -found["score"]

  return score


def absolute(path: PathLike) -> epath.Path:
  """Returns the absolute path, with "~" expanded, as Orbax requires."""
  return epath.Path(path).expanduser().absolute()


def verify(checkpoint: epath.Path, advice: Callable[[], str]) -> None:
  """Compares the files of a checkpoint with its manifest.

  Checkpoints without a manifest are not checked: those of version 0.1, and those in buckets, which
  have checksums of their own.

  Args:
    checkpoint: the directory of one step.
    advice: returns the end of the error message: what to do without this checkpoint.

  Raises:
    ValueError: a file is missing, or has another size or checksum.
  """
  problem = _find_damage(checkpoint) if is_primary() else None
  problem = all_gather_objects(problem)[0]
  if problem:
    raise ValueError(f"{_describe(checkpoint)} is damaged ({problem}); {advice()}")


def _find_damage(checkpoint: epath.Path) -> str | None:
  manifest = checkpoint / MANIFEST
  if _is_remote(checkpoint) or not manifest.exists():
    return None
  try:
    expected = json.loads(manifest.read_text())["crc32"]
  except (ValueError, KeyError):
    return f"{MANIFEST} is not readable"
  found = _checksums(checkpoint)
  for name, (size, checksum) in expected.items():
    if name not in found:
      return f"{name} is missing"
    if found[name][0] != size:
      return f"{name} has {found[name][0]} bytes; expected {size}"
    if found[name][1] != checksum:
      return f"{name} has another checksum than when it was written"
  return None


def _checksums(directory: epath.Path) -> dict[str, list[int]]:
  """Returns size and CRC-32 of every file, by relative path."""
  root = pathlib.Path(os.fspath(directory))
  files = [
    path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in _UNCHECKED
  ]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = pool.map(_checksum, files)
    return {str(path.relative_to(root)): value for path, value in zip(files, found, strict=True)}


def _checksum(path: pathlib.Path) -> list[int]:
  size = path.stat().st_size
  if not size:
    return [0, 0]
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return [size, zlib.crc32(content)]


def _is_remote(path: epath.Path) -> bool:
  return "://" in os.fspath(path)


def _describe(checkpoint: epath.Path) -> str:
  step = f" of step {checkpoint.name}" if checkpoint.name.isdigit() else ""
  return f"the checkpoint{step} in {checkpoint}"


_LONGEST_REASON = 160
_DAMAGE = (FileNotFoundError, KeyError, EOFError, ValueError)


@contextlib.contextmanager
def _damage_reported(checkpoint: epath.Path, advice: Callable[[], str]) -> Iterator[None]:
  """Raises one line for errors of reading files that have no manifest; see `verify`."""
  try:
    yield
  except Exception as error:
    # Orbax wraps the error of one array in an Exception of no class, with pages of details.
    cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
    if type(cause) is not Exception and not isinstance(cause, _DAMAGE):
      raise
    reason = _end_of(cause, checkpoint)
    raise ValueError(f"{_describe(checkpoint)} is damaged ({reason}); {advice()}") from None


def _end_of(error: BaseException, checkpoint: epath.Path) -> str:
  """Returns the end of a message whose parts lead from the whole to the cause, each after ": "."""
  text = " ".join(str(error).replace(f"{checkpoint}/", "").split())
  text = text.partition(" [")[0].partition(". See full TensorStore details")[0]
  parts = text.split(": ")
  while len(parts) > 1 and len(": ".join(parts)) > _LONGEST_REASON:
    del parts[0]
  return ": ".join(parts)[:_LONGEST_REASON].rstrip(".")


@contextlib.contextmanager
def writing(workdir: epath.Path, newest: Callable[[], int | None]) -> Iterator[None]:
  """Raises one line if the disk is full.

  Args:
    workdir: the run's directory.
    newest: returns the step of the newest complete checkpoint, None if there is none.

  Raises:
    OSError: the disk is full.
  """

  def advice() -> str:
    step = newest()
    last = "none is complete yet" if step is None else f"that of step {step} is complete"
    return f"{last}: free disk space and run the same command again"

  with disk_errors.explained(f"a checkpoint cannot be written to {workdir}", advice):
    yield


_MAX_LISTED = 8


def _differences(
  expected: Mapping[str, Any], saved: Mapping[str, Any], *, with_dtype: bool
) -> Iterator[str]:
  for key, leaf in expected.items():
    if key not in saved:
      yield f"{key} is not in the checkpoint"
    elif tuple(leaf.shape) != tuple(saved[key].shape):
      yield f"{key} has shape {tuple(saved[key].shape)}; expected {tuple(leaf.shape)}"
    elif with_dtype and leaf.dtype != saved[key].dtype:
      yield f"{key} is {np.dtype(saved[key].dtype)}; expected {leaf.dtype}"


def _unused(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
  return (f"{key} is only in the checkpoint" for key in saved if key not in expected)


def _raise_if_any(problems: Sequence[str], what: str) -> None:
  """Logs all problems; raises ValueError with the first ones, if there are any."""
  if problems:
    logging.error("%s:\n%s", what, "\n".join(problems))
    more = len(problems) - _MAX_LISTED
    listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise ValueError(f"{what}: {listed}")


def _by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves by "/"-joined path: attributes, keys and indices alike, as Orbax does."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved_arrays(item: epath.Path) -> dict[str, Any]:
  """Returns shape and dtype of each saved array by path, without reading any array."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(item)
  return _by_path(metadata.tree)


def _collections(saved: Mapping[str, Any], *, use_ema: bool) -> dict[str, str]:
  """Returns the path of each collection of variables within a saved train state."""
  has_ema = any(key.startswith("ema/") for key in saved)
  parent = "ema" if use_ema and has_ema else "model_state"
  names = {key.split("/")[1] for key in saved if key.startswith(f"{parent}/")}
  return {"params": "params"} | {name: f"{parent}/{name}" for name in names}


def _renamed(key: str, names: Mapping[str, str]) -> str:
  collection, _, rest = key.partition("/")
  return f"{names.get(collection, collection)}/{rest}"


def _in(key: str, names: Mapping[str, str]) -> bool:
  return any(key.startswith(f"{name}/") for name in names.values())


def _abstract_from(saved: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  """Builds a tree of variables, with shapes, out of the saved paths."""
  places = names or {key.split("/")[0]: key.split("/")[0] for key in saved}
  tree: dict[str, Any] = {}
  for collection, place in places.items():
    for key, leaf in saved.items():
      if key.startswith(f"{place}/"):
        *parents, name = [collection, *key.removeprefix(f"{place}/").split("/")]
        node = tree
        for parent in parents:
          node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return tree


def _read(
  item: epath.Path, variables: Mapping[str, Any], names: Mapping[str, str], *, as_numpy: bool
) -> dict[str, Any]:
  """Reads only the named part of what `item` holds."""
  if as_numpy:
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), variables)
  else:
    variables = jax.tree.map(_placed, variables)
    arguments = ocp.checkpoint_utils.construct_restore_args(variables)
  restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
    item,
    args=ocp.args.PyTreeRestore(
      item=_as_saved(variables, names),
      restore_args=_as_saved(arguments, names),
      partial_restore=True,
    ),
  )
  return {name: _at(restored, names.get(name, name)) for name in variables}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _as_saved(variables: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  """Returns the collections at their paths within a saved train state."""
  tree: dict[str, Any] = {}
  for name, value in variables.items():
    *parents, last = names.get(name, name).split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def _at(tree: Any, path: str) -> Any:
  for key in path.split("/"):
    tree = tree[key]
  return tree
