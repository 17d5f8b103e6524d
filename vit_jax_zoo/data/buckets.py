"""Images of different sizes in one batch: which go together, and how large the batch is.

XLA compiles a step once for each shape, so batches may have a handful of shapes, the buckets. An
image is padded at the right and bottom to the bucket of its batch. What is padded is computed in
vain; therefore images of like size should meet. Two plans see to that, from the images' sizes
alone, so that all hosts come to the same without reading an image:

* In training the positions of a run (`data/order.py`) are taken in windows of some batches. What a
  position holds, and at which random scale, stays as it was; within a window the positions are
  sorted by size, cut into batches, and the batches shuffled. So the batch of step t is a function
  of (seed, t) still, and every example comes once in an epoch, give or take a window.
* In evaluation an image goes to the smallest bucket that holds it, and meets only images of the
  same bucket. So its padding, on which some models' results depend, is its own affair: scores do
  not change with the batch size or with the other images.
"""

import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from absl import logging
from jaxtyping import Int

from vit_jax_zoo.data.shuffle import RandomNumbers, shuffled_index
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source

Shape: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

Transforms: TypeAlias = Sequence[Callable[[Example, np.random.Generator], Example]]

WINDOW = 128
"""Batches that are sorted together."""

SAMPLE = 10_000
"""So many positions of a run decide which buckets are chosen, where only their number is given."""

MULTIPLE = 32
"""Chosen buckets have sides that are multiples of this: a ResNet's stride."""

_SHUFFLE = 2
"""Keeps this use of the seed apart from those of `data/order.py`."""


@dataclasses.dataclass(frozen=True)
class Buckets:
  """The shapes that batches may have.

  Attributes:
    shapes: from the smallest area to the largest; the last one holds what any of them holds.
  """

  shapes: tuple[Shape, ...]

  @classmethod
  def of(cls, shapes: Iterable[Sequence[int]]) -> "Buckets":
    """Returns buckets of these shapes, and of one that is as high and wide as any of them.

    Raises:
      ValueError: one of them is no (height, width).
    """
    given = set[Shape]()
    for shape in shapes:
      if len(shape) != 2 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"buckets: expected pairs (height, width) in pixels, got {shape}")
      given.add((shape[0], shape[1]))
    if not given:
      raise ValueError("buckets: expected at least one (height, width)")
    given.add((max(height for height, _ in given), max(width for _, width in given)))
    return cls(tuple(sorted(given, key=lambda shape: (shape[0] * shape[1], shape))))

  def find(self, height: int, width: int) -> int:
    """Returns the number of the smallest bucket that holds an image of this size.

    Raises:
      ValueError: none does.
    """
    for number, (bucket_height, bucket_width) in enumerate(self.shapes):
      if height <= bucket_height and width <= bucket_width:
        return number
    raise ValueError(
      f"an image of {height}x{width} pixels (height, width) fits into none of the buckets "
      f"{self.shapes}; add a larger one, or scale the images down"
    )


def choose_buckets(
  sizes: Int[np.ndarray, "n 2"], count: int, multiple: int = MULTIPLE
) -> tuple[Shape, ...]:
  """Returns shapes that hold all images, with little padding.

  Begins with a shape for each size, and replaces, over and over, those two by the one that holds
  both for which this adds the least padding.

  Args:
    sizes: heights and widths, drawn as they will be.
    count: how many shapes.
    multiple: sides are rounded up to multiples of this.
  """
  rounded = -(-np.asarray(sizes, np.int64) // multiple) * multiple
  shapes, weights = np.unique(rounded, axis=0, return_counts=True)
  while len(shapes) > count:
    both = np.maximum(shapes[:, None], shapes[None])
    areas = shapes.prod(axis=1)
    added = (both.prod(axis=2) - areas) * weights[None]  # what each costs the second of a pair
    cost = (added + added.T).astype(np.float64)
    np.fill_diagonal(cost, np.inf)
    one, other = np.unravel_index(np.argmin(cost), cost.shape)
    shapes[one], weights[one] = both[one, other], weights[one] + weights[other]
    shapes, weights = np.delete(shapes, other, axis=0), np.delete(weights, other)
  return tuple((int(height), int(width)) for height, width in shapes)


@functools.lru_cache(maxsize=8)
def source_sizes(source: Source) -> Int[np.ndarray, "n 2"]:
  """Returns height and width of every image of a source; reads their headers if it has to.

  Images that are none get (1, 1): whoever loads them will say which they are.
  """

  def size(index: int) -> Shape:
    try:
      return source.image_size(index)
    except CorruptExampleError:
      return 1, 1

  def read(indices: range) -> list[Shape]:
    return [size(index) for index in indices]

  count, at_once = len(source), 1024
  start = time.monotonic()
  parts = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
  with concurrent.futures.ThreadPoolExecutor() as threads:
    sizes = [size for part in threads.map(read, parts) for size in part]
  if time.monotonic() - start > 5:
    seconds = time.monotonic() - start
    logging.info("read the sizes of %d images of %s in %.0f s", count, source.info.name, seconds)
  return np.array(sizes, np.int32).reshape(count, 2)


class Room(NamedTuple):
  """Heights and widths in a batch.

  Attributes:
    image: of the images as they come out of the transforms.
    original: of what keeps the size of the images as they were stored.
  """

  image: Shape
  original: Shape


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Knows how large an example will be when it comes out of the transforms.

  Attributes:
    sizes: of the images, by example.
    transforms: what they go through.
  """

  sizes: Any  # Int[np.ndarray, "n 2"]
  transforms: tuple[Any, ...]

  @property
  def original(self) -> Shape:
    """Height and width that every image has room in before it is transformed."""
    height, width = self.sizes.max(axis=0)
    return int(height), int(width)

  def __call__(self, index: int, rng: np.random.Generator) -> Shape:
    """Returns height and width of example `index`, transformed with these random numbers."""
    size = int(self.sizes[index, 0]), int(self.sizes[index, 1])
    for transform in self.transforms:
      size = transform.output_size(size, rng)
    return size


class TrainPlan:
  """Says which positions of a run make up the batch of a step, and its shape.

  Args:
    forecast: of the examples.
    seed: of the run.
    batch_size: of all hosts together.
    buckets: the shapes.
    window: so many batches are sorted together.
  """

  def __init__(
    self, forecast: Forecast, seed: int, batch_size: int, buckets: Buckets, window: int = WINDOW
  ) -> None:
    self.buckets = buckets
    self._forecast = forecast
    self._seed = seed
    self._batch_size = batch_size
    self._window = window

  def __call__(self, step: int) -> tuple[Int[np.ndarray, " b"], Room]:
    """Returns the positions of the batch, row by row, and how large it is."""
    number, place = divmod(step, self._window)
    with _LOCK:  # threads that prepare neighbouring batches need the same window
      batches, shapes = _planned(self, number)
    return batches[place], Room(shapes[place], self._forecast.original)

  def plan_window(self, number: int) -> tuple[Int[np.ndarray, "w b"], list[Shape]]:
    """Returns the positions of each batch of a window, and the batches' shapes."""
    count = self._window * self._batch_size
    first = number * count
    sizes = forecast_run(self._forecast, self._seed, range(first, first + count))
    found = [self.buckets.find(*size) for size in sizes]
    order = sorted(range(count), key=lambda i: (_along(self.buckets.shapes[found[i]]), i))
    batches = np.array(order).reshape(self._window, self._batch_size)
    shapes = [self.buckets.shapes[self._holding([sizes[i] for i in batch])] for batch in batches]
    seed = np.random.SeedSequence(self._seed, spawn_key=(_SHUFFLE, number))
    shuffled = np.random.default_rng(seed).permutation(self._window)
    return first + batches[shuffled], [shapes[i] for i in shuffled]

  def _holding(self, sizes: Sequence[Shape]) -> int:
    """Returns the number of the smallest bucket that holds all of these."""
    return self.buckets.find(max(height for height, _ in sizes), max(width for _, width in sizes))


def forecast_run(forecast: Forecast, seed: int, positions: Iterable[int]) -> list[Shape]:
  """Returns the sizes of what stands at these positions of a training run."""
  numbers, count = RandomNumbers(seed), len(forecast.sizes)
  return [
    forecast(shuffled_index(position, count, seed), numbers.at(position)) for position in positions
  ]


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=4)
def _planned(plan: TrainPlan, number: int) -> tuple[np.ndarray, list[Shape]]:
  return plan.plan_window(number)


def _along(shape: Shape) -> int:
  """Orders shapes from large wide ones over small ones to large high ones.

  So batches that mix two buckets, at the seams, mix small images or similar ones.
  """
  height, width = shape
  return height * width if height > width else -height * width


class EvalPlan:
  """Says which examples make up each batch of an evaluation, and its shape.

  Attributes:
    indices: int64 [batches * batch_size], examples row by row, -1 where a row has none.
    rooms: how large each batch is.
  """

  def __init__(self, forecast: Forecast, batch_size: int, buckets: Buckets) -> None:
    numbers = RandomNumbers(0)
    of_bucket: list[list[int]] = [[] for _ in buckets.shapes]
    for index in range(len(forecast.sizes)):
      of_bucket[buckets.find(*forecast(index, numbers.at(index)))].append(index)
    indices: list[int] = []
    self.rooms: list[Room] = []
    for shape, members in zip(buckets.shapes, of_bucket, strict=True):
      batches = -(-len(members) // batch_size)
      indices += members + [-1] * (batches * batch_size - len(members))
      self.rooms += [Room(shape, forecast.original)] * batches
    self.indices = np.array(indices, np.int64)


def plan_training(
  source: Source,
  transforms: Transforms,
  buckets: int | Sequence[Sequence[int]],
  *,
  seed: int,
  batch_size: int,
) -> TrainPlan:
  """Returns the plan of a training run: see `TrainPlan`, and `find_buckets` for the errors."""
  forecast = Forecast(source_sizes(source), tuple(transforms))
  return TrainPlan(forecast, seed, batch_size, find_buckets(forecast, buckets, seed))


def plan_evaluation(
  source: Source,
  transforms: Transforms,
  buckets: int | Sequence[Sequence[int]],
  *,
  batch_size: int,
) -> EvalPlan:
  """Returns the plan of an evaluation: see `EvalPlan`, and `find_buckets` for the errors."""
  forecast = Forecast(source_sizes(source), tuple(transforms))
  return EvalPlan(forecast, batch_size, find_buckets(forecast, buckets, seed=None))


def find_buckets(
  forecast: Forecast, buckets: int | Sequence[Sequence[int]], seed: int | None
) -> Buckets:
  """Returns the given buckets, or chooses as many as are asked for.

  Args:
    forecast: of the examples.
    buckets: shapes; or how many to choose for the sizes that are to be expected.
    seed: of a training run; None for an evaluation.

  Raises:
    ValueError: they are no shapes, or a transform cannot say how large its result will be.
  """
  if not isinstance(buckets, int):
    return Buckets.of(buckets)
  if buckets < 1:
    raise ValueError(f"buckets: expected at least 1, or pairs (height, width), got {buckets}")
  if seed is None:
    numbers = RandomNumbers(0)
    sizes = [forecast(index, numbers.at(index)) for index in range(len(forecast.sizes))]
  else:
    sizes = forecast_run(forecast, seed, range(SAMPLE))
  chosen = Buckets.of(choose_buckets(np.array(sizes), buckets))
  logging.info("images are padded to %s (height, width)", ", ".join(map(str, chosen.shapes)))
  return chosen
