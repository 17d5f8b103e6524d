"""Checkpoints: what a run leaves on disk, and how another mesh, run or program picks it up (Orbax).

    <workdir>/checkpoints/<step>/   state: everything a run needs to go on
    <workdir>/best/<step>/          variables: what predicts best so far;  metadata: its score

A save returns once the arrays are copied off the devices; a background thread writes them into a
temporary directory that is renamed when it is complete. Hence a run may be killed at any moment:
what is half-written is ignored, and cleared away by the next save of whoever goes on with the run;
older checkpoints are deleted only after a newer one is complete. Whoever only reads changes
nothing. All processes of a multi-process run call each function, and each writes its part.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from vit_jax_zoo.training import disk_errors as full_disk

PathLike: TypeAlias = str | os.PathLike[str]

CHECKPOINTS, BEST = "checkpoints", "best"
STATE, VARIABLES, METADATA = "state", "variables", "metadata"


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
      return directory / str(max(found, key=_merit(directory)))
    if found:
      return directory / str(max(found))
  raise FileNotFoundError(
    f"no complete checkpoint in {root}; give a run's workdir (with {CHECKPOINTS}/ or {BEST}/), "
    "or the directory of one checkpoint"
  )


def is_checkpoint(path: PathLike) -> bool:
  """Returns whether `path` is a run of ours, or a checkpoint of one, and not a published file."""
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


def others(directory: epath.Path) -> str:
  """Says which checkpoints a run has beside that in `directory`."""
  run = directory.parent.parent
  folders = [run / name / str(n) for name in (CHECKPOINTS, BEST) for n in steps(run / name)]
  found = [str(folder) for folder in folders if folder != directory]
  return f"use another: {', '.join(found)}" if found else "there is no other beside it"


def _merit(directory: epath.Path) -> Callable[[int], float]:
  """How good the best variables of a step are: a kill can leave those that were best before too."""

  def merit(step: int) -> float:
    folder = directory / str(step)
    with reading(folder, lambda: "remove this folder"):
      found = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / METADATA)
    return found["score"] if found["best_mode"] == "max" else -found["score"]

  return merit


def absolute(path: PathLike) -> epath.Path:
  """Returns the path as Orbax wants it."""
  return epath.Path(path).expanduser().absolute()


_MAX_LISTED = 8
_LONGEST_REASON = 160

_DAMAGE = re.compile("NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT")
"""How TensorStore begins where a file is missing, cut or full of noise; others may pass."""

_DETAILS = re.compile(r" \[\w+='|\. See full TensorStore details")
"""What follows is of use to those who know TensorStore's code."""


@contextlib.contextmanager
def reading(checkpoint: epath.Path, advice: Callable[[], str]) -> Iterator[None]:
  """Says of damage that it is there, and what to do.

  Args:
    checkpoint: the directory that is read; named by its step, where it is one of a run.
    advice: ends the message: how to go on without this checkpoint.

  Raises:
    ValueError: in place of whatever is raised where a file is missing, cut or full of noise.
  """
  try:
    yield
  except Exception as error:
    # Orbax wraps what happened to one array in an Exception of no class, with pages of details.
    cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
    if not _is_damage(cause):
      raise
    step = f" of step {checkpoint.name}" if checkpoint.name.isdigit() else ""
    raise ValueError(
      f"the checkpoint{step} in {checkpoint} is damaged ({_end_of(cause, checkpoint)}); {advice()}"
    ) from None


def _is_damage(error: BaseException) -> bool:
  known = FileNotFoundError | KeyError | EOFError | UnicodeDecodeError
  if isinstance(error, known) or type(error) is Exception:
    return True
  return isinstance(error, ValueError) and (
    type(error).__name__ == "JSONDecodeError" or bool(_DAMAGE.match(str(error)))
  )


def _end_of(error: BaseException, checkpoint: epath.Path) -> str:
  """Returns the end of a message whose parts lead from the whole to the cause, each after ": "."""
  text = " ".join(str(error).replace(f"{checkpoint}/", "").split())
  text = _DETAILS.split(text)[0]
  parts = text.split(": ")
  while len(parts) > 1 and len(": ".join(parts)) > _LONGEST_REASON:
    del parts[0]
  return ": ".join(parts)[:_LONGEST_REASON].rstrip(".")


@contextlib.contextmanager
def writing(workdir: epath.Path, complete: Callable[[], int | None]) -> Iterator[None]:
  """Says of a full disk that it is full, and what to do.

  Args:
    workdir: the run's directory.
    complete: returns the step of the newest complete checkpoint, None if there is none.

  Raises:
    OSError: in place of whatever is raised where there is no place left.
  """

  def advice() -> str:
    step = complete()
    last = "none is complete yet" if step is None else f"that of step {step} is complete"
    return f"{last}: make room, and give the same command again"

  with full_disk.explained(f"a checkpoint cannot be written to {workdir}", advice):
    yield


def differences(
  wanted: Mapping[str, Any], saved: Mapping[str, Any], *, with_dtype: bool
) -> Iterator[str]:
  """Yields how arrays that a program wants differ from a checkpoint's, both by path."""
  for key, leaf in wanted.items():
    if key not in saved:
      yield f"{key} is not in the checkpoint"
    elif tuple(leaf.shape) != tuple(saved[key].shape):
      yield f"{key} has shape {tuple(leaf.shape)} here and {tuple(saved[key].shape)} there"
    elif with_dtype and leaf.dtype != saved[key].dtype:
      yield f"{key} is {leaf.dtype} here and {np.dtype(saved[key].dtype)} there"


def unused(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
  """Yields which arrays a checkpoint has that nobody wants."""
  return (f"{key} is only in the checkpoint" for key in saved if key not in wanted)


def raise_if_any(problems: Sequence[str], what: str) -> None:
  """Raises ValueError with the first of the problems, if there is one; logs all."""
  if problems:
    logging.error("%s:\n%s", what, "\n".join(problems))
    more = len(problems) - _MAX_LISTED
    listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise ValueError(f"{what}: {listed}")


class Checkpointer:
  """Saves and restores the state of one run, and the variables that scored best.

  Closing waits for saves under way: use it as a context manager. Opening changes nothing on disk:
  the first save makes what is missing, and clears away what a killed run has left half-written.

  Attributes:
    workdir: the run's directory.
    read_only: whether saving is an error.
  """

  def __init__(
    self,
    workdir: PathLike,
    *,
    keep: int = 1,
    best_mode: str = "max",
    read_only: bool = False,
  ):
    """Looks for what is there already.

    Args:
      workdir: the run's directory; it need not exist.
      keep: how many of the newest checkpoints stay.
      best_mode: whether a higher ("max") or a lower ("min") score is better.
      read_only: promise not to save.

    Raises:
      ValueError: `keep` is below 1 or `best_mode` unknown.
    """
    if keep < 1:
      raise ValueError(f"checkpoint keep is {keep}; at least 1 must stay, or no run could resume")
    if best_mode not in ("max", "min"):
      raise ValueError(f"best_mode is {best_mode!r}; expected 'max' or 'min'")
    self.workdir, self.read_only, self._best_mode = absolute(workdir), read_only, best_mode
    self._newest = _Folder(self.workdir / CHECKPOINTS, max_to_keep=keep)
    newest = max(steps(self.workdir / BEST), default="")
    advice = "remove this folder: what is best will be found anew"
    with reading(self.workdir / BEST / str(newest), lambda: advice):
      self._best = _Folder(
        self.workdir / BEST,
        max_to_keep=1,
        best_fn=lambda metrics: metrics["score"],
        best_mode=best_mode,
      )
      best_step = self._best.manager.best_step()
      metrics = None if best_step is None else self._best.manager.metrics(best_step)
    self._best_score = None if metrics is None else float(metrics["score"])

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return self._newest.manager.latest_step()

  @property
  def best_score(self) -> float | None:
    """The score of the best variables so far, those of earlier starts of the run included."""
    return self._best_score

  def save(self, step: int, state: Any) -> bool:
    """Starts to save the state after `step` training steps; returns False if it is there already.

    The state's arrays may be donated as soon as this returns.

    Args:
      step: training steps completed.
      state: a tree of arrays on the devices.

    Raises:
      RuntimeError: opened read-only.
      OSError: the disk is full, which may be noticed in the save after.
    """
    self._check_writable()
    if step in self._newest.manager.all_steps():
      return False
    saved = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)})
    with writing(self.workdir, self._newest.newest):
      # The best variables first: a run resumed from this step would not look for them again.
      self._best.manager.wait_until_finished()
      return self._newest.to_write().save(step, args=saved, force=True)

  def restore(self, abstract_state: Any) -> Any | None:
    """Returns the newest complete checkpoint, or None if there is none.

    Args:
      abstract_state: the state, as arrays or `jax.ShapeDtypeStruct`s whose `sharding` says where to
        put each array; the mesh may differ from the one that saved.

    Raises:
      ValueError: names, shapes or dtypes differ from those saved; the message lists them. Or the
        checkpoint is damaged; the message says how to go on.
    """
    step = self.latest_step
    if step is None:
      return None
    directory = self.workdir / CHECKPOINTS / str(step)
    with reading(directory, self._how_to_go_on):
      saved = _saved_arrays(directory / STATE)
    wanted = _by_path(abstract_state)
    problems = [*differences(wanted, saved, with_dtype=True), *unused(wanted, saved)]
    raise_if_any(problems, f"the checkpoint {directory} does not fit this run's state")
    arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})
    with reading(directory, self._how_to_go_on):
      return self._newest.manager.restore(step, args=arguments)[STATE]

  def _how_to_go_on(self) -> str:
    """Says what happens without the newest checkpoint."""
    earlier = sorted(self._newest.manager.all_steps())[:-1]
    if earlier:
      return f"remove this folder, and the same command goes on from step {earlier[-1]}"
    best = self._best.manager.best_step()
    start = (
      "" if best is None else f" (or from --config.init_from={self.workdir / BEST / str(best)})"
    )
    return f"there is no earlier step: remove this folder, and the run begins anew{start}"

  def save_best(self, step: int, variables: Any, score: float | int) -> bool:
    """Saves the variables if the score beats all before; returns whether it does.

    Every process must give the same score. A score that is not a number never wins.

    Raises:
      RuntimeError: opened read-only.
    """
    self._check_writable()
    if not self._is_better(score):
      return False
    self._best_score = score = float(score)
    saved = ocp.args.Composite(
      **{
        VARIABLES: ocp.args.StandardSave(variables),
        METADATA: ocp.args.JsonSave({"score": score, "best_mode": self._best_mode}),
      }
    )
    with writing(self.workdir, self._newest.newest):
      if jax.process_count() > 1:  # hosts would mix up the barriers of two saves at once
        self._newest.manager.wait_until_finished()
      best = self._best.to_write()
      if step in best.all_steps():  # a repeated step came out differently
        best.delete(step)
      return best.save(step, args=saved, metrics={"score": score}, force=True)

  def _check_writable(self) -> None:
    if self.read_only:
      raise RuntimeError(f"the checkpoints in {self.workdir} were opened read-only")

  def _is_better(self, score: float | int) -> bool:
    if not math.isfinite(score) or self._best_score is None:
      return math.isfinite(score)
    return score > self._best_score if self._best_mode == "max" else score < self._best_score

  def wait(self) -> None:
    """Returns when all saves are complete on disk; raises what went wrong with them."""
    with writing(self.workdir, self._newest.newest):
      self._newest.manager.wait_until_finished()
      self._best.manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and gives up the background threads."""
    self.wait()
    self._newest.manager.close()
    self._best.manager.close()


class _Folder:
  """A directory of checkpoints. Nothing in it changes before `to_write` is called.

  Attributes:
    manager: knows the complete checkpoints.
  """

  def __init__(self, directory: epath.Path, **options: Any) -> None:
    self._directory, self._options, self._writable = directory, options, False
    self.manager = _open(directory, create=False, **options)

  def to_write(self) -> ocp.CheckpointManager:
    """Returns the manager, once the directory is there and cleared of temporary ones."""
    if not self._writable:
      self.manager.close()
      self.manager = _open(self._directory, cleanup_tmp_directories=True, **self._options)
      self._writable = True
    return self.manager

  def newest(self) -> int | None:
    """Returns the newest step that is complete on disk: not one whose save has failed."""
    return max(steps(self._directory), default=None)


def restore_variables(
  path: PathLike,
  abstract_variables: Mapping[str, Any] | None = None,
  *,
  prefer_best: bool = True,
  use_ema: bool = True,
  left_out: Sequence[str] = (),
) -> dict[str, Any]:
  """Reads parameters and model state alone, from a run or a single checkpoint.

  Args:
    path: a run's workdir, its `checkpoints` or `best` directory, or one step's directory in there.
    abstract_variables: `params` and the model's other collections, as arrays or
      `jax.ShapeDtypeStruct`s; each leaf is restored into its dtype and onto its `sharding` (one
      device of this process, if it has none). None gives numpy arrays, as they were saved.
    prefer_best: take the best variables of a workdir that has some; else the newest checkpoint.
    use_ema: take the averaged variables, where there are any.
    left_out: parts by path, "params/critic", that stay on disk when `abstract_variables` are given.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: parameters are missing, unused or of another shape; the message lists them all. Or
      the checkpoint is damaged; the message names the others that there are.
  """
  directory = find_checkpoint(path, prefer_best=prefer_best)
  item = directory / (STATE if (directory / STATE).exists() else VARIABLES)
  with reading(directory, lambda: others(directory)):
    saved = _saved_arrays(item)
  names = _collections(saved, use_ema=use_ema) if item.name == STATE else {}
  wanted = abstract_variables
  if wanted is None:
    wanted = _abstract_from(saved, names)
  else:
    by_path = {_renamed(key, names): leaf for key, leaf in _by_path(wanted).items()}
    left = tuple(_renamed(f"{part}/", names) for part in left_out)
    here = {k: x for k, x in saved.items() if item.name != STATE or _in(k, names)}
    here = {key: leaf for key, leaf in here.items() if not key.startswith(left)}
    problems = [*differences(by_path, saved, with_dtype=False), *unused(by_path, here)]
    raise_if_any(problems, f"the checkpoint {directory} does not fit this model")
  with reading(directory, lambda: others(directory)):
    return _read(item, wanted, names, as_numpy=abstract_variables is None)


def _open(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(**options),
    item_handlers={
      STATE: ocp.StandardCheckpointHandler(),
      VARIABLES: ocp.StandardCheckpointHandler(),
      METADATA: ocp.JsonCheckpointHandler(),
    },
  )


def _by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves by "/"-joined path: attributes, keys and indices alike, as Orbax does."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved_arrays(item: epath.Path) -> dict[str, Any]:
  """Returns shape and dtype of each saved array by path, without reading any array."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(item)
  return _by_path(metadata.tree)


def _collections(saved: Mapping[str, Any], *, use_ema: bool) -> dict[str, str]:
  """Says under which name a training state keeps each collection of variables."""
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
  """Moves each collection to where a training state keeps it."""
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
