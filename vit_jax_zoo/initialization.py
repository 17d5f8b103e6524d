"""What a run starts from: random numbers, what its task takes from files and data, `init_from`.

Nothing is read that would be overwritten: weights of a whole model make the files of its parts
unnecessary, and the training data from which a task would have learned.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo import weights
from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.training.checkpoint import is_checkpoint, restore_variables
from vit_jax_zoo.training.distributed import all_gather_objects


@dataclasses.dataclass(frozen=True)
class Start:
  """From fresh variables to those that a run starts from.

  Attributes:
    task: names files for parts of them, and learns others from the data.
    init_from: weights of a whole model, a published file or a run of ours; or None.
    preview: this process's part of the training batches; nothing is read before the first is asked
      for.
    grid: height and width of the images in tokens, for models that cut them into patches.
  """

  task: Task
  init_from: str | None
  preview: Iterable[Mapping[str, np.ndarray]]
  grid: tuple[int, int] | None = None

  def __call__(self, fresh: Variables) -> Variables:
    """Returns the variables to start from; those that nothing gives stay the fresh ones.

    Raises:
      ValueError: one line, about weights that do not fit.
      FileNotFoundError: one line, about what is needed and not there.
    """
    taken = self._init_from(self.init_from, fresh) if self.init_from else fresh
    before = _flatten(fresh)
    missing = [path for path, leaf in _flatten(taken).items() if leaf is before[path]]
    if not missing:
      return taken
    learned = all_gather_objects(self.task.prepare(self.preview))[0]
    files = weights.still_needed(self.task.weight_files, missing)
    sources = {k: restore_variables(f) if is_checkpoint(f) else f for k, f in files.items()}
    others = weights.load_parts(sources, {**fresh, **learned})
    return jax.tree.map(lambda a, b, other: other if a is b else a, taken, fresh, others)

  def _init_from(self, path: str, fresh: Variables) -> Variables:
    """Returns the variables with the weights of a run of ours, or of a published file."""
    logging.info("starting from the weights in %s", path)
    if not is_checkpoint(path):
      return weights.load_into(path, fresh, position_grid=self.grid)
    optional = self.task.training_only
    return weights.adapt(restore_variables(path), fresh, path, grid=self.grid, optional=optional)


def check_files(task: Task) -> None:
  """Finds the files that a task's parts start from, before anything is compiled for them.

  Raises:
    WeightsError: one line, about a file that is not there.
  """
  weights.find_files({k: f for k, f in task.weight_files.items() if not is_checkpoint(f)})


def _flatten(variables: Variables) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(variables), sep="/")
