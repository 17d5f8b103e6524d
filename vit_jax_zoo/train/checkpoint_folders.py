"""Which checkpoints there are: a run's folders, and the choice among them."""

import os
from collections.abc import Callable
from typing import TypeAlias

import orbax.checkpoint as ocp
from etils import epath

from vit_jax_zoo.train.checkpoint_errors import reading

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
