"""Bucketed batching of images of different sizes.

XLA compiles a step for each shape, so batches have one of a few shapes, the buckets, and images are
padded at the right and bottom to the bucket of their batch. To compute little padding, images of
similar size share a batch. Two plans follow from the images' sizes alone, so that all hosts compute
the same plan without reading an image:

* Training takes the positions of a run (`data/shuffle.py`) in windows of `WINDOW` batches. The
  example and the random numbers of a position do not change; within a window positions are sorted
  by size and cut into batches, and the batches are shuffled. The batch of step t is still a
  function of (seed, t), and an epoch has every example once, up to a window.
* Evaluation puts an image in the smallest bucket that holds it, with images of that bucket alone.
  Its padding, on which some models' results depend, and so the scores are independent of the batch
  size and of the other images.
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
"""Batches sorted together."""

SAMPLE = 10_000
"""Positions of a run from which buckets are chosen where only their number is given."""

MULTIPLE = 32
"""Sides of chosen buckets are multiples of this, a ResNet's stride."""

_SHUFFLE = 2
"""Separates this use of the seed from those of `data/shuffle.py`."""


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Shapes of batches.

  Attributes:
    shapes: by area; the last one holds every image that another one holds.
  """

  shapes: tuple[Shape, ...]

  @classmethod
  def of(cls, shapes: Iterable[Sequence[int]]) -> "Buckets":
    """Returns buckets of these shapes and of their largest height and width.

    Raises:
      ValueError: a shape is not (height, width).
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
    """Returns the index of the smallest bucket that holds an image of this size.

    Raises:
      ValueError: there is none.
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
  """Returns shapes that hold all images with little padding.

  Agglomerative: begins with a shape for each size and merges the two shapes whose common bound adds
  the least padding, until `count` remain.

  Args:
    sizes: a sample of heights and widths.
    count: number of shapes.
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
  """Returns height and width of every image of a source, from the headers if necessary.

  Unreadable images have (1, 1); loading them reports the error.
  """

  def size(index: int) -> Shape:
    try:
      return source.image_size(index)
    except (CorruptExampleError, OSError):
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


class PaddedShape(NamedTuple):
  """Heights and widths of a batch.

  Attributes:
    image: of the transformed images.
    original: of arrays that keep the size of the images before the transforms.
  """

  image: Shape
  original: Shape


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Predicts the size of transformed images.

  Attributes:
    sizes: of the source's images.
    transforms: applied in order.
  """

  sizes: Any  # Int[np.ndarray, "n 2"]
  transforms: tuple[Any, ...]

  @property
  def original(self) -> Shape:
    """Largest height and width before the transforms."""
    height, width = self.sizes.max(axis=0)
    return int(height), int(width)

  def __call__(self, index: int, rng: np.random.Generator) -> Shape:
    """Returns height and width of example `index`, transformed with these random numbers."""
    size = int(self.sizes[index, 0]), int(self.sizes[index, 1])
    for transform in self.transforms:
      size = transform.output_size(size, rng)
    return size


class TrainPlan:
  """Positions and shape of each training batch.

  Args:
    forecast: sizes of the examples.
    seed: of the run.
    batch_size: of all hosts together.
    buckets: the shapes.
    window: batches sorted together.
  """

  def __init__(
    self, forecast: Forecast, seed: int, batch_size: int, buckets: Buckets, window: int = WINDOW
  ) -> None:
    self.buckets = buckets
    self._forecast = forecast
    self._seed = seed
    self._batch_size = batch_size
    self._window = window

  def __call__(self, step: int) -> tuple[Int[np.ndarray, " b"], PaddedShape]:
    """Returns the positions of the batch, row by row, and its shape."""
    number, place = divmod(step, self._window)
    with _LOCK:  # threads that build neighboring batches need the same window
      batches, shapes = _planned(self, number)
    return batches[place], PaddedShape(shapes[place], self._forecast.original)

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
    """Returns the index of the smallest bucket that holds all sizes."""
    return self.buckets.find(max(height for height, _ in sizes), max(width for _, width in sizes))


def forecast_run(forecast: Forecast, seed: int, positions: Iterable[int]) -> list[Shape]:
  """Returns the sizes of the examples at these positions of a training run."""
  numbers, count = RandomNumbers(seed), len(forecast.sizes)
  return [
    forecast(shuffled_index(position, count, seed), numbers.at(position)) for position in positions
  ]


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=4)
def _planned(plan: TrainPlan, number: int) -> tuple[np.ndarray, list[Shape]]:
  return plan.plan_window(number)


def _along(shape: Shape) -> int:
  """Sort key: from large wide shapes over small ones to large high ones.

  Batches at the boundary of two buckets then have small or similar images.
  """
  height, width = shape
  return height * width if height > width else -height * width


class EvalPlan:
  """Examples and shape of each evaluation batch.

  Attributes:
    indices: int64 [batches * batch_size], examples row by row, -1 for a row without one.
    padded_shapes: shape of each batch.
  """

  def __init__(self, forecast: Forecast, batch_size: int, buckets: Buckets) -> None:
    numbers = RandomNumbers(0)
    of_bucket: list[list[int]] = [[] for _ in buckets.shapes]
    for index in range(len(forecast.sizes)):
      of_bucket[buckets.find(*forecast(index, numbers.at(index)))].append(index)
    indices: list[int] = []
    self.padded_shapes: list[PaddedShape] = []
    for shape, members in zip(buckets.shapes, of_bucket, strict=True):
      batches = -(-len(members) // batch_size)
      indices += members + [-1] * (batches * batch_size - len(members))
      self.padded_shapes += [PaddedShape(shape, forecast.original)] * batches
    self.indices = np.array(indices, np.int64)


def plan_training(
  source: Source,
  transforms: Transforms,
  buckets: int | Sequence[Sequence[int]],
  *,
  seed: int,
  batch_size: int,
) -> TrainPlan:
  """Returns the plan of a training run; errors as in `find_buckets`."""
  forecast = Forecast(source_sizes(source), tuple(transforms))
  return TrainPlan(forecast, seed, batch_size, find_buckets(forecast, buckets, seed))


def plan_evaluation(
  source: Source,
  transforms: Transforms,
  buckets: int | Sequence[Sequence[int]],
  *,
  batch_size: int,
) -> EvalPlan:
  """Returns the plan of an evaluation; errors as in `find_buckets`."""
  forecast = Forecast(source_sizes(source), tuple(transforms))
  return EvalPlan(forecast, batch_size, find_buckets(forecast, buckets, seed=None))


def find_buckets(
  forecast: Forecast, buckets: int | Sequence[Sequence[int]], seed: int | None
) -> Buckets:
  """Returns the given buckets, or chooses a given number.

  Args:
    forecast: sizes of the examples.
    buckets: shapes, or a number of shapes.
    seed: of a training run; None for an evaluation.

  Raises:
    ValueError: wrong shapes, or a transform whose output size is not known in advance.
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
