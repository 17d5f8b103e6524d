"""From the number of a batch to its arrays: what a thread or a worker process does in one go."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vit_jax_zoo.data.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.order import RandomNumbers, shuffled_index
from vit_jax_zoo.data.transform_base import pixels

Batch: TypeAlias = dict[str, np.ndarray]

MAX_REPLACEMENTS = 100
"""A training example and its replacements may fail this often in a row before the run stops."""

SKIPPED = "_skipped"
"""Where a batch says what was lost on the way to it: `Failures`."""


Failures: TypeAlias = tuple[tuple[str, str], ...]
"""Name and reason of each corrupt example."""


class Loaded(NamedTuple):
  """An example, or None where there is none, and what was lost on the way to it."""

  example: Example | None
  failures: Failures = ()


@dataclasses.dataclass(frozen=True)
class Loader:
  """From an index in the source to a finished example; it travels to the workers.

  Attributes:
    source: the examples.
    transforms: what each goes through.
    num_classes: labels must lie below it; by default what the source says.
    on_corrupt: "error" or "skip".
    replace: whether "skip" takes another example, drawn at random, instead of none.
  """

  source: Source
  transforms: tuple[Callable[[Example, np.random.Generator], Example], ...]
  num_classes: int | None
  on_corrupt: str
  replace: bool

  def __call__(self, index: int, rng: np.random.Generator) -> Loaded:
    """Loads example `index`; beyond the last one there is nothing."""
    if index >= len(self.source):
      return Loaded(None)
    failures: list[tuple[str, str]] = []
    while len(failures) < MAX_REPLACEMENTS:
      try:
        return Loaded(self.load(index, rng), tuple(failures))
      except CorruptExampleError as error:
        name = self.source.example_name(index)
        if self.on_corrupt == "error":
          raise CorruptExampleError(
            f"corrupt example {name}: {error}; remove it, or set on_corrupt='skip'"
          ) from None
        failures.append((name, str(error)))
      if not self.replace:
        return Loaded(None, tuple(failures))
      index = int(rng.integers(len(self.source)))
    raise CorruptExampleError(
      f"{MAX_REPLACEMENTS} examples of {self.source.info.name} in a row are corrupt, the last one "
      f"{failures[-1][0]}: {failures[-1][1]}"
    )

  def load(self, index: int, rng: np.random.Generator) -> Example:
    """Returns the example, checked, transformed and as arrays."""
    example = self.source[index]
    self._check_label(index, example)
    try:
      for transform in self.transforms:
        example = transform(example, rng)
      if isinstance(example.get("image"), bytes):
        example = {**example, "image": pixels(example["image"])}
    except CorruptExampleError:
      raise
    except ValueError as error:
      raise ValueError(f"{self.source.example_name(index)}: {error}") from error
    return {key: _as_array(value) for key, value in example.items()}

  def _check_label(self, index: int, example: Example) -> None:
    if "label" not in example:
      return
    label, num_classes = example["label"], self.num_classes or self.source.info.num_classes
    if isinstance(label, int) and 0 <= label < (num_classes or math.inf):
      return  # the usual case, without numpy's ten microseconds
    labels = np.asarray(label)
    bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if np.any(bad):
      raise ValueError(
        f"{self.source.example_name(index)} has label {labels[bad].flat[0]}, expected 0.."
        f"{(num_classes or 0) - 1} (num_classes={num_classes}); check the labels or num_classes"
      )


@dataclasses.dataclass(frozen=True)
class TrainBatches:
  """From the number of a training batch to the batch; it travels to the workers."""

  loader: Loader
  size: int
  seed: int

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns the examples at positions [number * size, (number + 1) * size) of the run."""
    numbers, count = RandomNumbers(self.seed), len(self.loader.source)
    rows = (
      self.loader(shuffled_index(position, count, self.seed), numbers.at(position))
      for position in range(number * self.size, (number + 1) * self.size)
    )
    batch, _, failures = _collect(rows, self.size)
    return {**batch, SKIPPED: failures}


@dataclasses.dataclass(frozen=True)
class MaskedBatches:
  """From the number of an evaluation batch to the batch; it travels to the workers.

  Rows without an example are zeros, and False in `mask`.
  """

  loader: Loader
  size: int

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns the examples [number * size, (number + 1) * size) of the source, and `mask`."""
    numbers = RandomNumbers(0)
    indices = range(number * self.size, (number + 1) * self.size)
    rows = (self.loader(index, numbers.at(index)) for index in indices)
    batch, mask, failures = _collect(rows, self.size)
    if not batch:
      batch, _, _ = _collect([Loaded(self._first_sound())], self.size)
    for values in batch.values():
      values[~mask] = 0
    return {**batch, "mask": mask, SKIPPED: failures}

  def _first_sound(self) -> Example:
    """Returns an example for its shapes, when the batch has none."""
    for index in range(min(len(self.loader.source), MAX_REPLACEMENTS)):
      example = self.loader(index, np.random.default_rng(0)).example
      if example is not None:
        return example
    raise CorruptExampleError(
      f"the first {index + 1} examples of {self.loader.source.info.name} are all corrupt"
    )


def _as_array(value: Any) -> np.ndarray:
  """Returns the array to stack: int32 for Python ints, as no accelerator wants 64 bits."""
  return np.asarray(value, np.int32) if isinstance(value, int) else np.asarray(value)


def _collect(rows: Iterable[Loaded], size: int) -> tuple[Batch, np.ndarray, Failures]:
  """Copies each example into the batch as soon as it is there, while the cache still holds it.

  Returns:
    The arrays, undefined in rows without an example, and empty when no row has one; the mask of the
    rows that do; what was lost.
  """
  batch: Batch = {}
  mask = np.zeros(size, bool)
  failures: list[tuple[str, str]] = []
  for row, (example, lost) in enumerate(rows):
    failures += lost
    if example is not None:
      mask[row] = True
      for key in batch or example:
        _put(batch, key, example[key], row, size)
  return batch, mask, tuple(failures)


def _put(batch: Batch, key: str, value: np.ndarray, row: int, size: int) -> None:
  """Sets one row of one array of the batch, which the first example of all gives its shape."""
  if key not in batch:
    batch[key] = np.empty((size, *value.shape), value.dtype)
  elif batch[key].dtype != value.dtype:
    batch[key] = batch[key].astype(np.promote_types(batch[key].dtype, value.dtype))
  if value.shape != batch[key].shape[1:]:
    remedy = {"image": "end the transforms with a resize or a crop", "label": "add multi_hot"}
    raise ValueError(
      f"{key!r} has different shapes in one batch, such as {batch[key].shape[1:]} and "
      f"{value.shape}; {remedy.get(key, 'bring them to one shape in a transform')}"
    )
  batch[key][row] = value
