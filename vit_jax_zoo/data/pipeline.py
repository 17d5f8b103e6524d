"""Batches of training and evaluation, on Grain.

The global batch of training step t is a pure function of (seed, t). Every epoch is a permutation of
the examples drawn from the seed; position i of the endless sequence of epochs is row i mod b of
step i div b; and the random numbers of an example's transforms come from (seed, i). The numbers of
hosts, threads and worker processes change no pixel, and a run resumes at any step without replay.

Host p reads only rows [p * b/hosts, (p + 1) * b/hosts) of each batch.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, TypeAlias

import grain
import numpy as np
from absl import flags, logging

from vit_jax_zoo.data.buckets import (
  BucketSpec,
  EvalPlan,
  Forecast,
  PaddedShape,
  TrainPlan,
  Transforms,
  source_sizes,
)
from vit_jax_zoo.data.shuffle import RandomNumbers, shuffled_index
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.transforms import Transform, pixels
from vit_jax_zoo.errors import check_names

_LISTED = 10  # examples that are named in a log line
LOADER_FIELDS = ("num_workers", "num_threads", "on_corrupt", "buckets")  # fields of `data.loader`

Batch: TypeAlias = dict[str, np.ndarray]

MAX_REPLACEMENTS = 100  # corrupt examples in a row at which a run stops, also with "skip"
SKIPPED = "_skipped"  # key of a batch's `Failures`

PADDED = {"image": (0, 0), "masks": (1, False), "label_map": (0, 255)}
"""Keys padded with their image: axis of the rows, value of the padding."""

PADDED_ORIGINAL = {"segment_map": (0, -1)}  # of the image's size before the transforms

_REMEDIES = {
  "image": "end the transforms with a resize or a crop, or set data.loader.buckets",
  "label": "add multi_hot (configs/finetune.py: multi_label=true)",
  **dict.fromkeys(("labels", "boxes_xyxy", "outlines"), "add load_objects and pad_objects"),
}
"""Fixes for examples of different shapes."""

Failures: TypeAlias = list[tuple[str, str]]  # name and reason of each corrupt example
Loaded: TypeAlias = tuple[Example | None, Failures]  # the corrupt examples were tried before


def train_batches(  # noqa: PLR0913  (each is a plain field of a config or of the process)
  source: Source,
  transforms: Transforms,
  *,
  batch_size: int,  # of all hosts together; a multiple of `process_count`
  seed: int,  # of the order of the examples and of all augmentation
  start_step: int = 0,  # no earlier one is replayed
  process_index: int = 0,  # this host
  process_count: int = 1,  # number of hosts
  num_workers: int = 0,  # processes; 0: threads of this one, faster up to a few cores
  num_threads: int | None = None,  # of each process; default: cores / processes, at most 16
  num_classes: int | None = None,  # bound of the labels; default: the source's
  on_corrupt: str = "error",  # stops at an image that cannot be decoded; or "skip"
  buckets: BucketSpec | None = None,  # for images of different sizes
  repeats: int = 1,  # rows of a batch with the same example, augmented differently
) -> "BatchIterator":
  """Returns this host's endless training batches from `start_step` on.

  The transforms make arrays of the same shape of each example. Each thread holds one batch of this
  host in memory. "skip" replaces a corrupt image by an example drawn from (seed, position) and
  counts it in the iterator's `skipped`. Buckets are the shapes (height, width) to which batches are
  padded, or a number of shapes to choose; see `data/buckets.py`. With repeated augmentation (Hoffer
  et al., arXiv:1901.09335; Berman et al., arXiv:1902.05509; timm's `--aug-repeats`) the steps of an
  epoch cover only a part of the data.

  ValueError for a wrong batch size, an empty source, a wrong label or examples of different shapes;
  without "skip" also for a corrupt image, and FileNotFoundError for missing files.
  """
  transforms = _for_source(transforms, source)
  local = _local_batch_size(source, batch_size, process_count, on_corrupt)
  if repeats < 1 or batch_size % repeats:
    raise ValueError(f"data.train.aug_repeats: {repeats}; expected a divisor of {batch_size=}")
  if repeats > 1 and buckets is not None:
    raise ValueError("data.train.aug_repeats: not with data.loader.buckets; remove one of them")
  plan = None
  if buckets is not None:
    plan = TrainPlan(Forecast(source_sizes(source), transforms), seed, batch_size, buckets)
  loader = Loader(source, transforms, num_classes, on_corrupt, replace=plan is None)
  # Batches of one host's size, in the order of their rows: host p takes every process_count-th.
  # An element is a batch: with Grain's shuffle, random_map and batch by example, images take 12 %
  # more CPU time for JPEG files of 500x375 (1.62 instead of 1.44 ms), 18 % more for 8x8 digits.
  numbers = grain.MapDataset.range(start_step * process_count + process_index, sys.maxsize)
  batches = TrainBatches(loader, local, seed, plan, process_count, repeats)
  return _iterate(numbers[::process_count].map(batches), num_workers, num_threads)


def training_shapes(
  source: Source,
  transforms: Transforms,
  *,
  batch_size: int,
  seed: int,
  num_classes: int | None = None,
  buckets: BucketSpec | None = None,
) -> list[tuple[float, Batch]]:
  """Returns the shapes of a training run's batches, for planning; arguments as in `train_batches`.

  For each shape, the most frequent first, its fraction of 512 steps and a batch of one example.
  """
  transforms = _for_source(transforms, source)
  loader = Loader(source, transforms, num_classes, "error", replace=False)
  plan, shapes = None, list[Any]([None])
  if buckets is not None:
    plan = TrainPlan(Forecast(source_sizes(source), transforms), seed, batch_size, buckets)
    shapes = [plan(step)[1] for step in range(512)]
  kinds = []
  for shape, count in collections.Counter(shapes).most_common():
    batch = TrainBatches(loader, 1, seed, plan)(shapes.index(shape))
    kinds.append((count / len(shapes), {key: batch[key] for key in batch if key != SKIPPED}))
  return kinds


def eval_batches(  # noqa: PLR0913
  source: Source,
  transforms: Transforms,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int | None = None,
  num_classes: int | None = None,
  on_corrupt: str = "error",
  buckets: BucketSpec | None = None,
) -> "EvalBatches":
  """Returns this host's batches of one pass over the source, with `buckets` shape by shape.

  Every host has the same number of batches, all of the same size; `mask` (bool [b]) is False for
  the zeros that pad the last batch, and with `on_corrupt="skip"` for corrupt images. Arguments and
  errors are those of `train_batches`; random transforms draw the same numbers in every evaluation.
  """
  transforms = _for_source(transforms, source)
  loader = Loader(source, transforms, num_classes, on_corrupt, replace=False)
  local = _local_batch_size(source, batch_size, process_count, on_corrupt)
  plan, num_batches = None, -(-len(source) // batch_size)
  if buckets is not None:
    plan = EvalPlan(Forecast(source_sizes(source), transforms), batch_size, buckets)
    num_batches = len(plan.padded_shapes)
  numbers = grain.MapDataset.range(num_batches * process_count)[process_index::process_count]
  batches = MaskedBatches(loader, local, plan, process_count)
  return EvalBatches(batches, numbers.map(batches), num_workers, num_threads)


class BatchIterator(Iterator[Batch]):
  """Batches of one host. Close it, or use it in a `with`, to end worker processes."""

  def __init__(self, iterator: grain.DatasetIterator, *, has_workers: bool) -> None:
    self.skipped = collections.Counter[str]()  # of each corrupt example so far, by its name
    self._iterator = iterator
    self._next = functools.partial(_start_workers if has_workers else next, iterator)

  def __next__(self) -> Batch:
    batch = self._next()
    self._next = functools.partial(next, self._iterator)
    for name, reason in batch.pop(SKIPPED):
      if name not in self.skipped:
        logging.warning("skipping a corrupt example, %s: %s", name, reason)
      self.skipped[name] += 1
    return batch

  @property
  def num_skipped(self) -> int:
    return self.skipped.total()

  def log_skipped(self) -> None:
    if names := sorted(self.skipped):
      count, listed = len(names), _first_names(names)
      logging.warning("%d examples could not be read and were skipped: %s", count, listed)

  def close(self) -> None:
    self._iterator.close()

  def __enter__(self) -> "BatchIterator":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


@dataclasses.dataclass
class EvalBatches:
  """Batches of an evaluation; each `iter()` starts at the first."""

  _batches: "MaskedBatches"
  _dataset: grain.MapDataset
  _num_workers: int
  _num_threads: int | None
  _last: BatchIterator | None = dataclasses.field(default=None, init=False, repr=False)

  def __len__(self) -> int:
    return len(self._dataset)

  def __iter__(self) -> BatchIterator:
    self._last = _iterate(self._dataset, self._num_workers, self._num_threads)
    return self._last

  def first_batch(self) -> Batch:
    """Returns the first batch of `iter()`; starts no pipeline."""
    batch: Any = self._dataset[0]
    return {key: batch[key] for key in batch if key != SKIPPED}

  def one_example(self) -> Batch:
    """Returns the first example as a batch, for shapes; starts no pipeline."""
    batch = dataclasses.replace(self._batches, size=1)(0)
    return {key: batch[key] for key in batch if key != SKIPPED}

  @property
  def num_skipped(self) -> int:
    """Number of skipped examples in the last iteration so far; 0 before the first."""
    return 0 if self._last is None else self._last.num_skipped


def _first_names(names: Sequence[str]) -> str:
  return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


@functools.lru_cache(maxsize=32)  # evaluations open their batches again and again
def _check_files(source: Source, on_corrupt: str) -> None:
  if not (missing := source.missing()):
    return
  named = _first_names([source.example_name(i) for i in missing])
  text = f"{source.info.name}: {len(missing)} files are missing: {named}"
  if on_corrupt == "error" or len(missing) == len(source):
    raise FileNotFoundError(f"{text}; add them, or use others by data.loader.on_corrupt='skip'")
  logging.warning("%s; they are skipped", text)


def _for_source(transforms: Transforms, source: Source) -> tuple[Any, ...]:
  return tuple(t.for_source(source) if isinstance(t, Transform) else t for t in transforms)


def _local_batch_size(source: Source, batch_size: int, process_count: int, on_corrupt: str) -> int:
  check_names("policy for corrupt examples", [on_corrupt], ("error", "skip"))
  if len(source) == 0:
    raise ValueError(f"{source.info.name} has no example")
  _check_files(source, on_corrupt)
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(f"batch_size is {batch_size}; expected a positive multiple of {process_count}")
  return batch_size // process_count


def _iterate(dataset: grain.MapDataset, num_workers: int, num_threads: int | None) -> BatchIterator:
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, also without an absl app
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # not on macOS
    cores = os.cpu_count() or 1
  threads = num_threads or max(1, min(16, cores // max(1, num_workers)))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  batches = dataset.to_iter_dataset(options)
  if num_workers:
    processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    batches = batches.mp_prefetch(processes, worker_init_fn=_end_with_parent)
  return BatchIterator(iter(batches), has_workers=num_workers > 0)


def _end_with_parent(*_: int) -> None:
  """Ends this worker process when its parent is killed; else it would wait forever."""

  def wait() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def _start_workers(iterator: grain.DatasetIterator) -> Any:
  """Returns the first batch, at which Grain starts the workers.

  They inherit a mask of the signals that only the run's main thread handles.
  """
  batch: concurrent.futures.Future[Any] = concurrent.futures.Future()

  def start() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
      batch.set_result(next(iterator))
    except BaseException as error:
      batch.set_exception(error)

  resource_tracker.ensure_running()  # its start unblocks them
  threading.Thread(target=start, daemon=True).start()
  return batch.result()


@dataclasses.dataclass(frozen=True)
class Loader:
  """Loads, checks and transforms examples by index; pickled to the worker processes."""

  source: Source
  transforms: Transforms  # applied in order
  num_classes: int | None  # bound of the labels; default: the source's
  on_corrupt: str  # "error" or "skip"
  replace: bool  # "skip" draws another example at random instead of returning none

  def __call__(self, index: int, rng: np.random.Generator) -> Loaded:
    """Returns example `index`, None outside of the source, and the failures before it."""
    if not 0 <= index < len(self.source):
      return None, []
    failures: Failures = []
    while len(failures) < MAX_REPLACEMENTS:
      try:
        return self._load(index, rng), failures
      except (CorruptExampleError, FileNotFoundError, PermissionError) as error:
        name, remedy = self.source.example_name(index), "set data.loader.on_corrupt='skip'"
        if self.on_corrupt == "error":
          text = f"corrupt example {name}: {error}; remove it, or {remedy}"
          raise CorruptExampleError(text) from None
        failures.append((name, str(error)))
      if not self.replace:
        return None, failures
      index = int(rng.integers(len(self.source)))
    raise _all_corrupt(f"{MAX_REPLACEMENTS} examples of {self.source.info.name} in a row", failures)

  def _load(self, index: int, rng: np.random.Generator) -> Example:
    """Returns the example as arrays, checked and transformed."""
    example, num_classes = self.source[index], self.num_classes or self.source.info.num_classes
    label = example.get("label", example.get("labels"))  # of an image, or those of its objects
    # numpy would take 10 microseconds for an int.
    if not isinstance(label, int | None) or not 0 <= (label or 0) < (num_classes or math.inf):
      self._check(index, np.asarray(label), num_classes)
    try:
      for transform in self.transforms:
        example = transform(example, rng)
      if isinstance(example.get("image"), bytes):
        example = {**example, "image": pixels(example["image"])}
    except CorruptExampleError:
      raise
    except KeyError as error:
      wrong = f"{self.source.example_name(index)}: the data has no {error}"
      raise ValueError(f"{wrong}; expected a source of the task's kind") from error
    except ValueError as error:
      raise ValueError(f"{self.source.example_name(index)}: {error}") from error
    if "label_map" in example and self.num_classes is not None:
      self._check(index, example["label_map"], self.num_classes, PADDED["label_map"][1])
    return {k: np.asarray(v, np.int32 if isinstance(v, int) else None) for k, v in example.items()}

  def _check(
    self, index: int, labels: np.ndarray, num_classes: int | None, ignored: int | None = None
  ) -> None:
    bad = (labels < 0) | (labels >= (num_classes or math.inf))
    bad = bad if ignored is None else bad & (labels != ignored)
    if np.any(bad):
      also, remedy = "", "the labels or num_classes"
      if ignored is not None:
        also, remedy = f" or {ignored}", "num_classes, and load_label_map's offset and ignore"
      raise ValueError(
        f"{self.source.example_name(index)} has label {labels[bad].flat[0]}, expected 0.."
        f"{(num_classes or 0) - 1}{also} (num_classes={num_classes}); check {remedy}"
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
      rows, padded = itertools.starmap(self.loader, map(self._draw, positions)), None
    else:
      step, host = divmod(number, self.hosts)
      positions, padded = self.plan(step)
      rows = (self._row(positions.tolist(), host * self.size + i) for i in range(self.size))
    batch, _, failures = _collect(rows, self.size, padded)
    return {**batch, SKIPPED: failures}

  def _row(self, positions: list[int], row: int) -> Loaded:
    """Returns the example of a row, or of the first following row whose example can be read."""
    loaded = itertools.starmap(self.loader, map(self._draw, positions[row:] + positions[:row]))
    name = self.loader.source.info.name
    return _first_readable(loaded, f"all {len(positions)} examples of a batch of {name}")

  def _draw(self, position: int) -> tuple[int, np.random.Generator]:
    """Returns the index and the random numbers of the example at a position."""
    source_position = position
    if self.repeats > 1:
      # An example is repeated after all others of the batch: neighbors, which mixup mixes, differ.
      step, row = divmod(position, self.size * self.hosts)
      different = self.size * self.hosts // self.repeats
      source_position = step * different + row % different
    index = shuffled_index(source_position, len(self.loader.source), self.seed)
    return index, RandomNumbers(self.seed).at(position)


@dataclasses.dataclass(frozen=True)
class MaskedBatches:
  """Evaluation batches by number; rows without an example are zeros, and False in `mask`."""

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
      tried = range(min(len(self.loader.source), MAX_REPLACEMENTS))
      loaded = (self.loader(index, np.random.default_rng(0)) for index in tried)
      what = f"the first {len(tried)} examples of {self.loader.source.info.name}"
      batch = _allocate(_first_readable(loaded, what)[0], self.size, padded)
    for values in batch.values():
      values[~mask] = 0
    return {**batch, "mask": mask, SKIPPED: failures}


def _first_readable(loaded: Iterable[Loaded], what: str) -> tuple[Example, Failures]:
  failures: Failures = []
  for example, new in loaded:
    failures += new
    if example is not None:
      return example, failures
  raise _all_corrupt(what, failures)


def _all_corrupt(what: str, failures: Failures) -> CorruptExampleError:
  name, reason = failures[-1]
  return CorruptExampleError(f"{what} are corrupt, the last one {name}: {reason}")


def _collect(
  rows: Iterable[Loaded], size: int, padded: PaddedShape | None = None
) -> tuple[Batch, np.ndarray, Failures]:
  """Copies each example into the batch as it arrives, while it is in the cache.

  Returns the arrays, undefined in rows without an example, and empty if no row has one; the mask of
  rows with an example; the failures.
  """
  batch: Batch = {}
  mask = np.zeros(size, bool)
  failures: Failures = []
  for row, (example, new) in enumerate(rows):
    failures += new
    if example is not None:
      mask[row] = True
      batch = batch or _allocate(example, size, padded)
      for key in batch:
        _put(batch, key, example[key], row, padded=padded is not None)
  return batch, mask, failures


def _allocate(example: Example, size: int, padded: PaddedShape | None) -> Batch:
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
  if batch[key].dtype != value.dtype:
    batch[key] = batch[key].astype(np.promote_types(batch[key].dtype, value.dtype))
  target = batch[key][row, ...]
  if padded and key in PADDED | PADDED_ORIGINAL and value.ndim == target.ndim:
    target = target[tuple(slice(side) for side in value.shape)]
  if value.shape != target.shape:
    remedy = _REMEDIES.get(key, "bring them to one shape in a transform")
    shapes = f"{target.shape} and {value.shape}"
    raise ValueError(f"{key!r} has different shapes in one batch, such as {shapes}; {remedy}")
  target[...] = value
