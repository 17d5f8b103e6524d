"""From the number of a batch to its arrays: what a thread or a worker process does in one go."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vit_jax_zoo.data.buckets import EvalPlan, Room, TrainPlan
from vit_jax_zoo.data.shuffle import RandomNumbers, shuffled_index
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.transforms.base import pixels

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
    """Loads example `index`; before the first one and beyond the last there is nothing."""
    if not 0 <= index < len(self.source):
      return Loaded(None)
    failures: list[tuple[str, str]] = []
    while len(failures) < MAX_REPLACEMENTS:
      try:
        return Loaded(self.load(index, rng), tuple(failures))
      except (CorruptExampleError, FileNotFoundError, PermissionError) as error:
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
    self._check_label_map(index, example)
    return {key: _as_array(value) for key, value in example.items()}

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
  """From the number of a training batch to the batch; it travels to the workers.

  Attributes:
    loader: of the examples.
    size: rows of this host.
    seed: of the run.
    plan: what belongs together, where images have different sizes; by default what comes together.
    hosts: how many there are; batches are numbered step by step, host by host.
    repeats: how often each example is in a batch, augmented anew; not with a plan.
  """

  loader: Loader
  size: int
  seed: int
  plan: TrainPlan | None = None
  hosts: int = 1
  repeats: int = 1

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns the examples at positions [number * size, (number + 1) * size) of the run.

    With a plan, those at the positions that it gives to these rows; what is lost to a corrupt image
    is then made up for by another position of the same batch, which has its shape.
    """
    if self.plan is None:
      positions = range(number * self.size, (number + 1) * self.size)
      batch, _, failures = _collect(map(self._at, positions), self.size)
    else:
      step, host = divmod(number, self.hosts)
      positions, room = self.plan(step)
      rows = (self._first_sound(positions, host * self.size + i) for i in range(self.size))
      batch, _, failures = _collect(rows, self.size, room)
    return {**batch, SKIPPED: failures}

  def _at(self, position: int) -> Loaded:
    count = len(self.loader.source)
    numbers = RandomNumbers(self.seed)
    return self.loader(shuffled_index(self._turn(position), count, self.seed), numbers.at(position))

  def _turn(self, position: int) -> int:
    """Returns whose turn it is at a row of the run, in the row of all epochs.

    The same examples come again after all others of the batch: neighbours, which mixup mixes, are
    different ones.
    """
    if self.repeats == 1:
      return position
    rows = self.size * self.hosts
    step, row = divmod(position, rows)
    different = rows // self.repeats
    return step * different + row % different

  def _first_sound(self, positions: np.ndarray, row: int) -> Loaded:
    """Returns the example of a row, or of the first row behind it whose example can be read."""
    failures: Failures = ()
    for i in range(len(positions)):
      example, lost = self._at(int(positions[(row + i) % len(positions)]))
      failures += lost
      if example is not None:
        return Loaded(example, failures)
    raise CorruptExampleError(
      f"all {len(positions)} examples of a batch of {self.loader.source.info.name} are corrupt, "
      f"the last one {failures[-1][0]}: {failures[-1][1]}"
    )


@dataclasses.dataclass(frozen=True)
class MaskedBatches:
  """From the number of an evaluation batch to the batch; it travels to the workers.

  Rows without an example are zeros, and False in `mask`.

  Attributes:
    loader: of the examples.
    size: rows of this host.
    plan: which examples meet, where images have different sizes; by default those that follow each
      other.
    hosts: how many there are.
  """

  loader: Loader
  size: int
  plan: EvalPlan | None = None
  hosts: int = 1

  def __call__(self, number: int) -> dict[str, Any]:
    """Returns the examples [number * size, (number + 1) * size) of the source, and `mask`.

    With a plan, they are counted in its order.
    """
    numbers = RandomNumbers(0)
    indices: Iterable[int] = range(number * self.size, (number + 1) * self.size)
    room = None
    if self.plan is not None:
      indices = self.plan.indices[list(indices)].tolist()
      room = self.plan.rooms[number // self.hosts]
    rows = (self.loader(index, numbers.at(max(index, 0))) for index in indices)
    batch, mask, failures = _collect(rows, self.size, room)
    if not batch:
      batch = _allocate(self._first_sound(), self.size, room)
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


PADDED = {"image": (0, 0), "masks": (1, False), "label_map": (0, 255)}
"""Keys that are padded with their image: the axis of its rows, and what stands in the padding."""

PADDED_ORIGINAL = {"segment_map": (0, -1)}
"""The same for keys that have the size that the image had before it was transformed."""


def _collect(
  rows: Iterable[Loaded], size: int, room: Room | None = None
) -> tuple[Batch, np.ndarray, Failures]:
  """Copies each example into the batch as soon as it is there, while the cache still holds it.

  Args:
    rows: the examples.
    size: how many.
    room: heights and widths in the batch; by default all examples have the same.

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
      batch = batch or _allocate(example, size, room)
      for key in batch:
        _put(batch, key, example[key], row, padded=room is not None)
  return batch, mask, tuple(failures)


def _allocate(example: Example, size: int, room: Room | None) -> Batch:
  """Returns arrays for a batch of such examples, full of what stands in the padding."""
  batch = {key: np.empty((size, *value.shape), value.dtype) for key, value in example.items()}
  if room is None:
    return batch
  for keys, (height, width) in ((PADDED, room.image), (PADDED_ORIGINAL, room.original)):
    for key in keys.keys() & batch.keys():
      value, (axis, fill) = example[key], keys[key]
      shape = (*value.shape[:axis], height, width, *value.shape[axis + 2 :])
      batch[key] = np.full((size, *shape), fill, value.dtype)
  return batch


def _put(batch: Batch, key: str, value: np.ndarray, row: int, *, padded: bool) -> None:
  """Sets one row of one array of the batch, which the first example of all gives its shape."""
  if batch[key].dtype != value.dtype:
    batch[key] = batch[key].astype(np.promote_types(batch[key].dtype, value.dtype))
  place = batch[key][row, ...]
  if padded and key in PADDED | PADDED_ORIGINAL and value.ndim == place.ndim:
    place = place[tuple(slice(side) for side in value.shape)]
  if value.shape != place.shape:
    remedy = {
      "image": "end the transforms with a resize or a crop, or set data.loader.buckets",
      "label": "add multi_hot",
      "labels": "add pad_objects",
    }
    raise ValueError(
      f"{key!r} has different shapes in one batch, such as {place.shape} and "
      f"{value.shape}; {remedy.get(key, 'bring them to one shape in a transform')}"
    )
  place[...] = value
