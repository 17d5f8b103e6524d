"""Bucketed batching of images of different sizes.

XLA compiles a step for each shape, so batches have one of a few shapes, the buckets, and images are
padded at the right and bottom to the bucket of their batch, whose images are of similar size. All
hosts compute the same plan, from the images' sizes only:

* Training takes the positions of a run (`data/shuffle.py`) in windows of `WINDOW` batches. The
  example and the random numbers of a position do not change; within a window positions are sorted
  by size and cut into batches, and the batches are shuffled. The batch of step t is still a
  function of (seed, t), and an epoch has every example once, up to a window.
* Evaluation pads an image to the smallest bucket that holds it, with a batch for each bucket. Its
  padding, on which some models' results depend, is independent of the batch size and of the other
  images, and so are the scores.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from absl import logging
from jaxtyping import Int

from vit_jax_zoo.data.shuffle import RandomNumbers, shuffled_index
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source

Shape: TypeAlias = tuple[int, int]  # height and width in pixels

Transforms: TypeAlias = Sequence[Callable[[Example, np.random.Generator], Example]]

BucketSpec: TypeAlias = int | Sequence[Sequence[int]]  # a number, or (height, width) pairs

WINDOW = 128  # batches sorted together
SAMPLE = 10_000  # positions of a run from which buckets are chosen where only their number is given
MULTIPLE = 32  # sides of chosen buckets are multiples of this, a ResNet's stride
_SHUFFLE = 2  # separates this use of the seed from those of `data/shuffle.py`


class Buckets:
  """Shapes (height, width) by area, or ValueError; the last one holds what any other one holds."""

  def __init__(self, shapes: Iterable[Sequence[int]]) -> None:
    given = set[Shape]()
    for shape in shapes:
      if len(shape) != 2 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"buckets: expected pairs (height, width) in pixels, got {shape}")
      given.add((shape[0], shape[1]))
    if not given:
      raise ValueError("buckets: expected at least one (height, width)")
    given.add((max(height for height, _ in given), max(width for _, width in given)))
    self.shapes = sorted(given, key=lambda shape: (shape[0] * shape[1], shape))

  def find(self, height: int, width: int) -> Shape:
    """Returns the smallest bucket that holds an image of this size, or ValueError."""
    for shape in self.shapes:
      if height <= shape[0] and width <= shape[1]:
        return shape
    raise ValueError(f"an image of {height}x{width}: in none of the buckets {self.shapes}; add one")


def choose_buckets(sizes: Int[np.ndarray, "n 2"], count: int) -> tuple[Shape, ...]:
  """Returns `count` shapes that hold all images of a sample with little padding.

  Agglomerative: begins with a shape for each size, with sides rounded up to `MULTIPLE`, and merges
  the two shapes whose common bound adds the least padding.
  """
  rounded = -(-np.asarray(sizes, np.int64) // MULTIPLE) * MULTIPLE
  shapes, weights = np.unique(rounded, axis=0, return_counts=True)
  while len(shapes) > count:
    both = np.maximum(shapes[:, None], shapes[None])
    areas = shapes.prod(axis=1)
    added = (both.prod(axis=2) - areas) * weights[None]  # padding of the second of a pair
    cost = (added + added.T).astype(np.float64)
    np.fill_diagonal(cost, np.inf)
    one, other = np.unravel_index(np.argmin(cost), cost.shape)
    shapes[one], weights[one] = both[one, other], weights[one] + weights[other]
    shapes, weights = np.delete(shapes, other, axis=0), np.delete(weights, other)
  return tuple((int(height), int(width)) for height, width in shapes)


@functools.lru_cache(maxsize=8)
def source_sizes(source: Source) -> Int[np.ndarray, "n 2"]:
  """Returns height and width of all images, from headers if necessary; (1, 1) if unreadable."""

  def read(index: int) -> Shape:
    try:
      return source.image_size(index)
    except (CorruptExampleError, OSError):
      return 1, 1

  start = time.monotonic()
  with ThreadPool(16) as threads:
    sizes = threads.map(read, range(len(source)), chunksize=1024)
  if (seconds := time.monotonic() - start) > 5:
    logging.info("read %d images' sizes of %s in %.0f s", len(sizes), source.info.name, seconds)
  return np.array(sizes, np.int32).reshape(-1, 2)


class PaddedShape(NamedTuple):
  """Heights and widths of a batch."""

  image: Shape  # of the transformed images
  original: Shape  # of arrays that keep the size of the images before the transforms


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Predicts the size of transformed images."""

  sizes: Any  # of the source's images, Int[np.ndarray, "n 2"]
  transforms: tuple[Any, ...]  # applied in order

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

  def run(self, seed: int, positions: Iterable[int]) -> list[Shape]:
    """Returns the sizes of the examples at these positions of a training run."""
    numbers, count = RandomNumbers(seed), len(self.sizes)
    return [self(shuffled_index(i, count, seed), numbers.at(i)) for i in positions]

  def evaluation(self) -> list[Shape]:
    numbers = RandomNumbers(0)
    return [self(index, numbers.at(index)) for index in range(len(self.sizes))]


def find_buckets(forecast: Forecast, buckets: BucketSpec, seed: int | None) -> Buckets:
  """Returns the buckets, given or chosen; ValueError for wrong shapes or unknown output sizes."""
  if not isinstance(buckets, int):
    return Buckets(buckets)
  if buckets < 1:
    raise ValueError(f"buckets: expected at least 1, or pairs (height, width), got {buckets}")
  sizes = forecast.evaluation() if seed is None else forecast.run(seed, range(SAMPLE))
  chosen = Buckets(choose_buckets(np.array(sizes), buckets))
  logging.info("images are padded to %s (height, width)", ", ".join(map(str, chosen.shapes)))
  return chosen


class TrainPlan:
  """Positions and shape of each training batch of all hosts; errors are those of `find_buckets`."""

  def __init__(
    self,
    forecast: Forecast,
    seed: int,
    batch_size: int,
    buckets: BucketSpec,
    window: int = WINDOW,  # batches sorted together
  ) -> None:
    self._buckets = find_buckets(forecast, buckets, seed)
    self._forecast, self._seed = forecast, seed
    self._batch_size, self._window = batch_size, window

  def __call__(self, step: int) -> tuple[Int[np.ndarray, " b"], PaddedShape]:
    """Returns the positions of the batch, row by row, and its shape."""
    number, index = divmod(step, self._window)
    with _LOCK:  # threads that build neighboring batches need the same window
      batches, shapes = _planned(self, number)
    return batches[index], PaddedShape(shapes[index], self._forecast.original)

  def plan_window(self, number: int) -> tuple[Int[np.ndarray, "w b"], list[Shape]]:
    """Returns the positions of each batch of a window, and the batches' shapes."""
    count = self._window * self._batch_size
    first = number * count
    sizes = self._forecast.run(self._seed, range(first, first + count))
    found = [self._buckets.find(*size) for size in sizes]
    # From large landscape shapes over small ones to large portrait ones: batches at the boundary of
    # two buckets then have small or similar images.
    rank = [h * w if h > w else -h * w for h, w in found]
    order = sorted(range(count), key=lambda i: (rank[i], i))
    batches = np.array(order).reshape(self._window, self._batch_size)
    largest = np.array(sizes)[batches].max(axis=1).tolist()
    shapes = [self._buckets.find(*size) for size in largest]
    seed = np.random.SeedSequence(self._seed, spawn_key=(_SHUFFLE, number))
    shuffled = np.random.default_rng(seed).permutation(self._window)
    return first + batches[shuffled], [shapes[i] for i in shuffled]


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=4)
def _planned(plan: TrainPlan, number: int) -> tuple[np.ndarray, list[Shape]]:
  return plan.plan_window(number)


class EvalPlan:
  """Examples and shape of each evaluation batch; errors are those of `find_buckets`.

  `indices`, int64 [batches * batch_size], are examples row by row, -1 for a row without one.
  """

  def __init__(self, forecast: Forecast, batch_size: int, buckets: BucketSpec) -> None:
    found = find_buckets(forecast, buckets, seed=None)
    members: dict[Shape, list[int]] = {shape: [] for shape in found.shapes}
    for index, size in enumerate(forecast.evaluation()):
      members[found.find(*size)].append(index)
    indices: list[int] = []
    self.padded_shapes: list[PaddedShape] = []
    for shape, examples in members.items():
      batches = -(-len(examples) // batch_size)
      indices += examples + [-1] * (batches * batch_size - len(examples))
      self.padded_shapes += [PaddedShape(shape, forecast.original)] * batches
    self.indices = np.array(indices, np.int64)
