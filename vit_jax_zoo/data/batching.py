"""Builds the arrays of one batch from its number, in a thread or a worker process."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

from vit_jax_zoo.data.buckets import EvalPlan, PaddedShape, TrainPlan
from vit_jax_zoo.data.shuffle import RandomNumbers, shuffled_index
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.transforms.base import pixels

Batch: TypeAlias = dict[str, np.ndarray]

MAX_REPLACEMENTS = 100
"""Corrupt examples in a row at which a run stops, although `on_corrupt` is "skip"."""

SKIPPED = "_skipped"  # key of a batch's `Failures`

PADDED = {"image": (0, 0), "masks": (1, False), "label_map": (0, 255)}
"""Keys padded with their image: axis of the rows, value of the padding."""

PADDED_ORIGINAL = {"segment_map": (0, -1)}
"""The same for keys of the image's size before the transforms."""

_REMEDIES = {
  "image": "end the transforms with a resize or a crop, or set data.loader.buckets",
  "label": "add multi_hot",
  "labels": "add pad_objects",
}
"""Fixes for examples of different shapes."""

Failures: TypeAlias = tuple[tuple[str, str], ...]  # name and reason of each corrupt example


Loaded: TypeAlias = tuple[Example | None, Failures]
"""An example, or None, and the corrupt examples that were tried before."""


@dataclasses.dataclass(frozen=True)
class Loader:
  """Loads, checks and transforms examples by index; pickled to the worker processes."""

  source: Source
  transforms: tuple[Callable[[Example, np.random.Generator], Example], ...]  # applied in order
  num_classes: int | None  # bound of the labels; default: the source's
  on_corrupt: str  # "error" or "skip"
  replace: bool  # "skip" draws another example at random instead of returning none

  def __call__(self, index: int, rng: np.random.Generator) -> Loaded:
    """Loads example `index`; nothing outside of the source."""
    if not 0 <= index < len(self.source):
      return None, ()
    failures: list[tuple[str, str]] = []
    while len(failures) < MAX_REPLACEMENTS:
      try:
        return self.load(index, rng), tuple(failures)
      except (CorruptExampleError, FileNotFoundError, PermissionError) as error:
        name = self.source.example_name(index)
        if self.on_corrupt == "error":
          raise CorruptExampleError(
            f"corrupt example {name}: {error}; remove it, or set data.loader.on_corrupt='skip'"
          ) from None
        failures.append((name, str(error)))
      if not self.replace:
        return None, tuple(failures)
      index = int(rng.integers(len(self.source)))
    raise CorruptExampleError(
      f"{MAX_REPLACEMENTS} examples of {self.source.info.name} in a row are corrupt, the last one "
      f"{failures[-1][0]}: {failures[-1][1]}"
    )

  def load(self, index: int, rng: np.random.Generator) -> Example:
    """Returns the example as arrays, checked and transformed."""
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
    self._check_label_map(index, example)
    return {k: np.asarray(v, np.int32 if isinstance(v, int) else None) for k, v in example.items()}

  def _check_label_map(self, index: int, example: Example) -> None:
    if "label_map" not in example or self.num_classes is None:
      return
    labels = example["label_map"]
    wrong = labels[(labels >= self.num_classes) & (labels != PADDED["label_map"][1])]
    if wrong.size:
      raise ValueError(
        f"{self.source.example_name(index)} has label {wrong[0]}, expected 0.."
        f"{self.num_classes - 1} or 255 (num_classes={self.num_classes}); check num_classes, and "
        "load_label_map's offset and ignore"
      )

  def _check_label(self, index: int, example: Example) -> None:
    key = "label" if "label" in example else "labels"  # one of an image, those of its objects
    if key not in example:
      return
    label, num_classes = example[key], self.num_classes or self.source.info.num_classes
    if isinstance(label, int) and 0 <= label < (num_classes or math.inf):
      return  # the usual case, without numpy's 10 microseconds
    labels = np.asarray(label)
    bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if np.any(bad):
      raise ValueError(
        f"{self.source.example_name(index)} has label {labels[bad].flat[0]}, expected 0.."
        f"{(num_classes or 0) - 1} (num_classes={num_classes}); check the labels or num_classes"
      )


@dataclasses.dataclass(frozen=True)
class TrainBatches:
  """Training batches by number; pickled to the worker processes."""

  loader: Loader
  size: int  # rows of this host
  seed: int  # of the run
  plan: TrainPlan | None = None  # of images of different sizes; default: consecutive positions
  hosts: int = 1  # batches are numbered step by step, host by host
  repeats: int = 1  # rows with the same example, augmented differently; not with a plan

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns the examples at positions [number * size, (number + 1) * size) of the run.

    With a plan, those at its positions for these rows; a corrupt image is then replaced by the next
    one of the same batch, which has the batch's shape.
    """
    if self.plan is None:
      positions = range(number * self.size, (number + 1) * self.size)
      batch, _, failures = _collect(map(self._at, positions), self.size)
    else:
      step, host = divmod(number, self.hosts)
      positions, padded = self.plan(step)
      rows = (self._first_readable(positions, host * self.size + i) for i in range(self.size))
      batch, _, failures = _collect(rows, self.size, padded)
    return {**batch, SKIPPED: failures}

  def _at(self, position: int) -> Loaded:
    source_position = position
    if self.repeats > 1:
      # An example is repeated after all others of the batch: neighbors, which mixup mixes, differ.
      step, row = divmod(position, self.size * self.hosts)
      different = self.size * self.hosts // self.repeats
      source_position = step * different + row % different
    index = shuffled_index(source_position, len(self.loader.source), self.seed)
    return self.loader(index, RandomNumbers(self.seed).at(position))

  def _first_readable(self, positions: np.ndarray, row: int) -> Loaded:
    """Returns the example of a row, or of the first following row whose example can be read."""
    failures: Failures = ()
    for i in range(len(positions)):
      example, lost = self._at(int(positions[(row + i) % len(positions)]))
      failures += lost
      if example is not None:
        return example, failures
    raise CorruptExampleError(
      f"all {len(positions)} examples of a batch of {self.loader.source.info.name} are corrupt, "
      f"the last one {failures[-1][0]}: {failures[-1][1]}"
    )


@dataclasses.dataclass(frozen=True)
class MaskedBatches:
  """Evaluation batches by number; pickled to the worker processes.

  Rows without an example are zeros, and False in `mask`.
  """

  loader: Loader
  size: int  # rows of this host
  plan: EvalPlan | None = None  # of images of different sizes; default: consecutive examples
  hosts: int = 1

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns examples [number * size, (number + 1) * size), in the plan's order, and `mask`."""
    numbers = RandomNumbers(0)
    indices: Iterable[int] = range(number * self.size, (number + 1) * self.size)
    padded = None
    if self.plan is not None:
      indices = self.plan.indices[list(indices)].tolist()
      padded = self.plan.padded_shapes[number // self.hosts]
    rows = (self.loader(index, numbers.at(max(index, 0))) for index in indices)
    batch, mask, failures = _collect(rows, self.size, padded)
    if not batch:
      batch = _allocate(self._first_readable(), self.size, padded)
    for values in batch.values():
      values[~mask] = 0
    return {**batch, "mask": mask, SKIPPED: failures}

  def _first_readable(self) -> Example:
    """Returns an example for the shapes of a batch that has none."""
    for index in range(min(len(self.loader.source), MAX_REPLACEMENTS)):
      example, _ = self.loader(index, np.random.default_rng(0))
      if example is not None:
        return example
    raise CorruptExampleError(
      f"the first {index + 1} examples of {self.loader.source.info.name} are all corrupt"
    )


def _collect(
  rows: Iterable[Loaded], size: int, padded: PaddedShape | None = None
) -> tuple[Batch, np.ndarray, Failures]:
  """Copies each example into the batch as it arrives, while it is in the cache.

  Returns the arrays, undefined in rows without an example, and empty if no row has one; the mask of
  rows with an example; the failures.
  """
  batch: Batch = {}
  mask = np.zeros(size, bool)
  failures: list[tuple[str, str]] = []
  for row, (example, lost) in enumerate(rows):
    failures += lost
    if example is not None:
      mask[row] = True
      batch = batch or _allocate(example, size, padded)
      for key in batch:
        _put(batch, key, example[key], row, padded=padded is not None)
  return batch, mask, tuple(failures)


def _allocate(example: Example, size: int, padded: PaddedShape | None) -> Batch:
  """Returns a batch's arrays for examples like this one, filled with the padding."""
  batch = {key: np.empty((size, *value.shape), value.dtype) for key, value in example.items()}
  if padded is None:
    return batch
  for keys, (height, width) in ((PADDED, padded.image), (PADDED_ORIGINAL, padded.original)):
    for key in keys.keys() & batch.keys():
      value, (axis, fill) = example[key], keys[key]
      shape = (*value.shape[:axis], height, width, *value.shape[axis + 2 :])
      batch[key] = np.full((size, *shape), fill, value.dtype)
  return batch


def _put(batch: Batch, key: str, value: np.ndarray, row: int, *, padded: bool) -> None:
  """Sets one row of an array; the batch's first example gives the shape."""
  if batch[key].dtype != value.dtype:
    batch[key] = batch[key].astype(np.promote_types(batch[key].dtype, value.dtype))
  place = batch[key][row, ...]
  if padded and key in PADDED | PADDED_ORIGINAL and value.ndim == place.ndim:
    place = place[tuple(slice(side) for side in value.shape)]
  if value.shape != place.shape:
    raise ValueError(
      f"{key!r} has different shapes in one batch, such as {place.shape} and "
      f"{value.shape}; {_REMEDIES.get(key, 'bring them to one shape in a transform')}"
    )
  place[...] = value
