"""Initial variables: random init, pretrained sub-trees, data-dependent init, `init_from`."""

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
class Initializer:
  """Replaces randomly initialised variables by pretrained and data-dependent ones."""

  task: Task
  init_from: str | None  # a published file or a run
  preview: Iterable[Mapping[str, np.ndarray]]  # this process's training batches; read if needed
  grid: tuple[int, int] | None = None  # height and width of the images in tokens

  def __call__(self, fresh: Variables) -> Variables:
    """Returns the initial variables, given randomly initialised ones."""
    loaded = self._init_from(self.init_from, fresh) if self.init_from else fresh
    before = _flatten(fresh)
    missing = [path for path, leaf in _flatten(loaded).items() if leaf is before[path]]
    if not missing:
      return loaded
    from_data = all_gather_objects(self.task.init_from_data(self.preview))[0]
    files = weights.still_needed(self.task.weight_files, missing)
    sources = {k: restore_variables(f) if is_checkpoint(f) else f for k, f in files.items()}
    others = weights.load_parts(sources, {**fresh, **from_data})
    return jax.tree.map(lambda a, b, other: other if a is b else a, loaded, fresh, others)

  def _init_from(self, path: str, fresh: Variables) -> Variables:
    logging.info("initialising from %s", path)
    if not is_checkpoint(path):
      return weights.load_into(path, fresh, position_grid=self.grid)
    optional = self.task.train_only_collections
    return weights.fit_to_model(
      restore_variables(path), fresh, path, grid=self.grid, optional=optional
    )


def check_files(task: Task, init_from: str | None) -> None:
  """Raises WeightsError if `init_from`, or else a pretrained file of the task, does not exist."""
  # With init_from, the files that are needed depend on its variables.
  files = {"init_from": init_from} if init_from else task.weight_files
  weights.find_files({k: f for k, f in files.items() if not is_checkpoint(f)})


def _flatten(variables: Variables) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(variables), sep="/")
