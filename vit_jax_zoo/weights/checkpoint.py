"""A published checkpoint after reading: its arrays, key table, and the model's fields.

Every format returns a `Checkpoint`. A family whose parameters depend on the image size (position
tables) derives a class and overrides `choose_size`, `at_size` and `fit_positions_to`. `side`,
`outputs_of` and `count` infer fields, each from the first of several arrays: a file with a missing
or misshapen one is still recognised, and all its problems are reported together.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging
from flax import linen as nn

from vit_jax_zoo.errors import field_names
from vit_jax_zoo.weights.key_map import Flat, Row
from vit_jax_zoo.weights.preprocess import Preprocess

Size: TypeAlias = tuple[int, int]  # height and width


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What each format's `read_checkpoint` returns.

  Paths are relative to `params`; those of other collections begin with the collection:
  "batch_stats/stem/norm/mean". `heads`, `below_heads` and `first_kernels` are prefixes of paths.
  """

  source: str  # name of the file, for error messages
  family: str  # of the model, a key of `registry.model_classes()`
  arrays: Flat  # by published key, fused matrices split
  table: Sequence[Row]  # key table
  fields: Mapping[str, Any]  # of the model's class, as far as the arrays determine them
  preprocess: Preprocess
  task: str = "classification"  # trained for, a key of `tasks.tasks()`; "" of a part of a network
  task_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as `class_names`
  ignore: tuple[str, ...] = ()  # regular expressions of keys that may stay unused
  heads: tuple[str, ...] = ("head/",)  # new if the number of classes differs
  below_heads: tuple[str, ...] = ()  # layers that a model may leave out; its head is then new
  first_kernels: tuple[str, ...] = ()  # applied to images, [h w channels out]
  optional: tuple[str, ...] = ()  # collections that the file may lack although the table has rows
  inputs: tuple[Any, ...] = ()  # of `model.init`, if they are not one image
  image_size: Size | None = None  # of training, if known
  trained_network: str = ""  # key in `params` where a task trains the model beside other networks

  def key(self, path: str) -> str | None:
    """Returns the published key of a parameter's path, None if the file lacks it."""
    return next((key for row in self.table if (key := row.key(path)) in self.arrays), None)

  def array(self, path: str) -> np.ndarray | None:
    """Returns a parameter's array in the file's layout, None if the file lacks it."""
    return self.arrays.get(self.key(path) or "")

  def ours(self, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a parameter's array in our layout, None if the file lacks it."""
    rows = ((row, self.arrays.get(row.key(path) or "")) for row in self.table)
    return next((row.transform.read(a, shape) for row, a in rows if a is not None), None)

  def has(self, prefix: str) -> bool:
    """Returns whether the file has parameters whose path begins with `prefix`."""
    return bool(self._keys(prefix))

  def without(self, prefix: str) -> Any:
    """Returns the checkpoint without the parameters whose path begins with `prefix`."""
    dropped = self._keys(prefix)
    return self.replace(arrays={k: array for k, array in self.arrays.items() if k not in dropped})

  def _keys(self, prefix: str) -> set[str]:
    rows = [row for row in self.table if row.ours.startswith(prefix)]
    return {key for key in self.arrays if any(row.path(key) is not None for row in rows)}

  def replace(self, **fields: Any) -> Any:
    """Returns the checkpoint with other fields."""
    return dataclasses.replace(self, **fields)

  def choose_size(
    self, model: Any, requested: Size | None, trained: Size | None
  ) -> tuple[Size, "Checkpoint"]:
    """Returns the size of the model's images, and the checkpoint with its training size."""
    del model
    size = requested or trained or self.image_size or self.preprocess.image_size
    return size, self.replace(image_size=trained or self.image_size)

  def example_inputs(self, size: Size) -> tuple[Any, ...]:
    """Returns inputs for `model.init`, of which only the shapes matter."""
    return self.inputs or (np.zeros((1, *size, self.image_channels), np.float32),)

  @property
  def image_channels(self) -> int:
    """Number of channels of the images: that of the first kernel, 3 by default."""
    kernels = (self.ours(path, ()) for path in self.first_kernels)
    kernel = next((kernel for kernel in kernels if kernel is not None), None)
    return 3 if kernel is None or kernel.ndim != 4 else kernel.shape[2]

  def at_size(
    self, target: Mapping[str, Any], model: Any, size: Size, *, method: str | None = None
  ) -> "Checkpoint":
    """Returns the checkpoint with arrays that depend on the image size resized for `size`.

    `target` are the model's variables by path; `method` resizes positions, None: the publisher's.
    """
    del target, model, size, method
    return self

  def fit_positions_to(
    self, target: Mapping[str, Any], grid: Size | None, method: str | None
  ) -> "Checkpoint":
    """Returns `self` with position tables as in `target`; `grid` in tokens, None: square."""
    del target, grid, method
    return self


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its weights.

  `write_checkpoint` of a format takes one whose variables are arrays by path, layers unrolled.
  """

  model: nn.Module  # `model.apply(variables, images)`
  variables: dict[str, Any]  # numpy arrays: `{"params": ..., ...}`; of an export, by path
  preprocess: Preprocess
  config: dict[str, Any]  # the model's fields, and "image_size"
  task: str = "classification"  # trained for, a key of `tasks.tasks()`; "" for a part of a network
  task_fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # such as `class_names`

  @property
  def class_names(self) -> tuple[str, ...]:
    """Class names in order; empty if the file does not state them."""
    return tuple(self.task_fields.get("class_names") or ())

  def warn_not_stored(self, path: str, assumed: Preprocess, *others: str) -> None:
    """Logs what a format without a config loses: other preprocessing than readers assume, names."""
    ours, theirs = map(dataclasses.asdict, (self.preprocess, assumed))
    lost = [f"{k}={v} (read as {theirs[k]})" for k, v in ours.items() if v != theirs[k]]
    lost += ["class_names"] if self.class_names else []
    if lost := [*lost, *others]:
      logging.warning("%s: its format does not store %s", path, ", ".join(lost))

  def fields(self) -> dict[str, Any]:
    """Returns the model's fields by name."""
    return {name: getattr(self.model, name) for name in field_names(self.model)}


def side(arrays: Mapping[str, np.ndarray], *places: tuple[str, int, int]) -> int | None:
  """Returns a size from the first matching array; None if there is none.

  A place is a regular expression of keys, their number of axes, and the axis.
  """
  for pattern, rank, axis in places:
    for key, array in arrays.items():
      if array.ndim == rank and re.fullmatch(pattern, key):
        return array.shape[axis]
  return None


def outputs_of(arrays: Mapping[str, np.ndarray], layer: str) -> int | None:
  """Returns the number of outputs of a PyTorch dense layer from its weight or bias, else None."""
  return side(arrays, (rf"{layer}\.bias", 1, 0), (rf"{layer}\.weight", 2, 0))


def count(keys: Iterable[str], pattern: str) -> int:
  """Returns the number of layers; the pattern's group is a layer's number, from 0."""
  numbers = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
  return 1 + max(numbers, default=-1)
