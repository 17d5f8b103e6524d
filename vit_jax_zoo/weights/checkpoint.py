"""A published file, read: its arrays, the table that names them, the model that they are of.

Every format returns one of these, and `weights.load` knows nothing else. A family whose parameters
depend on more than the model's fields (positions on a grid of tokens) derives a class of its own
and overrides `choose_size` and `at_size`.
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
    source: the file's name, for messages.
    family: of the model, a key of `registry.model_classes()`.
    arrays: by published key, joint matrices taken apart.
    table: connects the keys with our paths. A path below `params` stands alone; one of another
      collection begins with its name: "batch_stats/stem/norm/mean", "palette/clusters".
    fields: of the model's class, all that the arrays determine.
    preprocess: what happens to pictures.
    task: what the weights were trained for, a key of `tasks.tasks()`; "" of a part of a network.
    task_fields: of that task, beside the model and what `preprocess` knows: `class_names`, ...
    ignore: regular expressions of keys that may stay unused.
    heads: our paths begin so where a new task may start afresh: when the number of classes is
      another, or the model has no head.
    below_heads: our paths begin so in layers that a model may leave out, and then its head, which
      was trained on their output, starts afresh, too.
    first_kernels: our paths of the kernels one of which images come to first, [h w channels out].
    optional: collections that a file may lack, although the table has rows for them: a palette.
    image_size: of the images that the weights were trained on, if it is known.
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
    """Returns the key under which the file has our parameter, None if it has not."""
    row = self._row(path)
    return None if row is None else row.key(path)

  def array(self, path: str) -> np.ndarray | None:
    """Returns what the file has for our parameter, in the file's layout."""
    key = self.key(path)
    return None if key is None else self.arrays[key]

  def ours(self, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns what the file has for our parameter of that shape, in our layout."""
    row = self._row(path)
    return None if row is None else row.transform.read(self.arrays[row.key(path) or ""], shape)

  def _row(self, path: str) -> Row | None:
    return next((row for row in self.table if row.key(path) in self.arrays), None)

  def has(self, prefix: str) -> bool:
    """Tells whether the file has any of our parameters whose path begins so."""
    return bool(self._keys(prefix))

  def without(self, prefix: str) -> Any:
    """Returns the same without those parameters."""
    dropped = self._keys(prefix)
    return self.replace(arrays={k: array for k, array in self.arrays.items() if k not in dropped})

  def _keys(self, prefix: str) -> set[str]:
    rows = [row for row in self.table if row.ours.startswith(prefix)]
    return {key for key in self.arrays if any(row.path(key) is not None for row in rows)}

  def replace(self, **fields: Any) -> Any:
    """Returns the same with other fields."""
    return dataclasses.replace(self, **fields)

  def choose_size(
    self, model: Any, wanted: Size | None, trained: Size | None
  ) -> tuple[Size, "Checkpoint"]:
    """Settles the size of images for which the variables are made.

    Args:
      model: of these weights, with the user's overrides.
      wanted: what the user asks for.
      trained: what the user says the weights were trained on.

    Returns:
      The size, and the checkpoint with `image_size` known as well as it can be.
    """
    del model
    size = wanted or trained or self.image_size or self.preprocess.image_size
    return size, self.replace(image_size=trained or self.image_size)

  def example_inputs(self, size: Size) -> tuple[np.ndarray, ...]:
    """Returns what `model.init` is called with, for its shapes alone: one batch of one image."""
    return (np.zeros((1, *size, self.image_channels), np.float32),)

  @property
  def image_channels(self) -> int:
    """How many channels images have: 3, unless the first kernel takes another number."""
    for path in self.first_kernels:
      kernel = self.ours(path, ())
      if kernel is not None:
        return kernel.shape[2] if kernel.ndim == 4 else 3
    return 3

  def at_size(
    self, target: Mapping[str, Any], model: Any, size: Size, *, method: str | None = None
  ) -> "Checkpoint":
    """Returns the same with arrays that depend on the size of images fitted to `size`.

    Args:
      target: the model's variables by path, with shapes.
      model: see `choose_size`.
      size: of the images to come.
      method: how positions are resized; None: as the code does it that published the file.
    """
    del target, model, size, method
    return self

  def fit_positions_to(
    self, target: Mapping[str, Any], grid: Size | None, method: str | None
  ) -> "Checkpoint":
    """Returns the same with position tables resized to those of existing variables.

    Args:
      target: the model's variables by path, with shapes.
      grid: height and width of the model's grid of tokens; None: square.
      method: as of `at_size`.
    """
    del target, grid, method
    return self


@dataclasses.dataclass(frozen=True)
class Export:
  """What each format's `write_checkpoint` is given.

  Attributes:
    family: of the model, a key of `registry.model_classes()`.
    model: the Linen module.
    variables: by path as in `Checkpoint.table`, layers unrolled, numpy arrays.
    preprocess: what happens to pictures.
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
    """The names of the classes in order, or none."""
    return tuple(self.task_fields.get("class_names") or ())

  def fields(self) -> dict[str, Any]:
    """Returns the model's fields by name."""
    return {name: getattr(self.model, name) for name in field_names(self.model)}
