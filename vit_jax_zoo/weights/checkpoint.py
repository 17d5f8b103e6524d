"""A published checkpoint after reading: its arrays, key table, and the model's fields.

Every format returns a `Checkpoint`. A family whose parameters depend on the image size (position
tables) derives a class and overrides `choose_size`, `at_size` and `fit_positions_to`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vit_jax_zoo.errors import field_names
from vit_jax_zoo.weights.key_map import Flat, Row
from vit_jax_zoo.weights.preprocess import Preprocess

Size: TypeAlias = tuple[int, int]
"""Height and width."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What each format's `read_checkpoint` returns.

  Attributes:
    source: name of the file, for error messages.
    family: of the model, a key of `registry.model_classes()`.
    arrays: by published key, fused matrices split.
    table: key table. Paths are relative to `params`; those of other collections begin with the
      collection: "batch_stats/stem/norm/mean".
    fields: of the model's class, as far as the arrays determine them.
    preprocess: preprocessing of images.
    task: that the weights were trained for, a key of `tasks.tasks()`; "" of a part of a network.
    task_fields: known fields of the task, such as `class_names`.
    ignore: regular expressions of keys that may stay unused.
    heads: path prefixes that are newly initialised if the number of classes differs, and dropped if
      the model has no head.
    below_heads: path prefixes of layers that a model may leave out; its head, which was trained on
      their output, is then newly initialised.
    first_kernels: paths of the kernels applied to images, [h w channels out].
    optional: collections that the file may lack although the table has rows for them.
    image_size: of training, if known.
    trained_network: the key in `params` under which a task trains the model beside other networks;
      "" where it trains the model alone.
  """

  source: str
  family: str
  arrays: Flat
  table: Sequence[Row]
  fields: Mapping[str, Any]
  preprocess: Preprocess
  task: str = "classification"
  task_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignore: tuple[str, ...] = ()
  heads: tuple[str, ...] = ("head/",)
  below_heads: tuple[str, ...] = ()
  first_kernels: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  image_size: Size | None = None
  trained_network: str = ""

  def key(self, path: str) -> str | None:
    """Returns the published key of a parameter's path, None if the file lacks it."""
    row = self._row(path)
    return None if row is None else row.key(path)

  def array(self, path: str) -> np.ndarray | None:
    """Returns a parameter's array in the file's layout, None if the file lacks it."""
    key = self.key(path)
    return None if key is None else self.arrays[key]

  def ours(self, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a parameter's array in our layout, None if the file lacks it."""
    row = self._row(path)
    return None if row is None else row.transform.read(self.arrays[row.key(path) or ""], shape)

  def _row(self, path: str) -> Row | None:
    return next((row for row in self.table if row.key(path) in self.arrays), None)

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
    self, model: Any, wanted: Size | None, trained: Size | None
  ) -> tuple[Size, "Checkpoint"]:
    """Selects the image size for which the variables are made.

    Args:
      model: of these weights, with the user's overrides.
      wanted: size requested by the user.
      trained: training size stated by the user.

    Returns:
      The size, and the checkpoint with its `image_size` filled in where known.
    """
    del model
    size = wanted or trained or self.image_size or self.preprocess.image_size
    return size, self.replace(image_size=trained or self.image_size)

  def example_inputs(self, size: Size) -> tuple[np.ndarray, ...]:
    """Returns inputs for `model.init`, of which only the shapes matter: one image."""
    return (np.zeros((1, *size, self.image_channels), np.float32),)

  @property
  def image_channels(self) -> int:
    """Number of channels of the images: that of the first kernel, 3 by default."""
    for path in self.first_kernels:
      kernel = self.ours(path, ())
      if kernel is not None:
        return kernel.shape[2] if kernel.ndim == 4 else 3
    return 3

  def at_size(
    self, target: Mapping[str, Any], model: Any, size: Size, *, method: str | None = None
  ) -> "Checkpoint":
    """Returns the checkpoint with arrays that depend on the image size resized for `size`.

    Args:
      target: the model's variables by path, with shapes.
      model: see `choose_size`.
      size: of the images.
      method: interpolation of position embeddings; None: the publisher's.
    """
    del target, model, size, method
    return self

  def fit_positions_to(
    self, target: Mapping[str, Any], grid: Size | None, method: str | None
  ) -> "Checkpoint":
    """Returns the checkpoint with position tables resized to those of existing variables.

    Args:
      target: the model's variables by path, with shapes.
      grid: height and width of the model's grid of tokens; None: square.
      method: as of `at_size`.
    """
    del target, grid, method
    return self


@dataclasses.dataclass(frozen=True)
class Export:
  """What each format's `write_checkpoint` takes.

  Attributes:
    family: of the model, a key of `registry.model_classes()`.
    model: the Linen module.
    variables: numpy arrays by path as in `Checkpoint.table`, layers unrolled.
    preprocess: preprocessing of images.
    task: see `Checkpoint`.
    task_fields: see `Checkpoint`.
  """

  family: str
  model: Any
  variables: Flat
  preprocess: Preprocess
  task: str = "classification"
  task_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def class_names(self) -> tuple[str, ...]:
    """Class names in order; empty if unknown."""
    return tuple(self.task_fields.get("class_names") or ())

  def fields(self) -> dict[str, Any]:
    """Returns the model's fields by name."""
    return {name: getattr(self.model, name) for name in field_names(self.model)}
