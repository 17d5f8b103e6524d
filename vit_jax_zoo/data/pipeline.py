"""Batches: which examples a step sees, in what order, on which host.

The global batch of training step t is a pure function of (seed, t). Every epoch is a permutation of
the examples drawn from the seed; position i of the endless row of epochs belongs to row i mod b of
step i div b; and the random numbers an example is transformed with come from (seed, i). So neither
the number of hosts, nor of threads, nor of worker processes changes a pixel, and a run resumes at
any step without replaying what came before.

Host p reads only rows [p * b/hosts, (p + 1) * b/hosts) of each batch.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import grain
import numpy as np
from absl import flags, logging

from vit_jax_zoo.data.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.transforms import pixels
from vit_jax_zoo.ops.names import unknown_name

Batch: TypeAlias = dict[str, np.ndarray]
Transforms: TypeAlias = Sequence[Callable[[Example, np.random.Generator], Example]]
CORRUPT_POLICIES = ("error", "skip")

MAX_REPLACEMENTS = 100
"""A training example and its replacements may fail this often in a row before the run stops."""

_SKIPPED = "_skipped"


def train_batches(  # noqa: PLR0913  (each is a plain field of a config or of the process)
  source: Source,
  transforms: Transforms,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int | None = None,
  num_classes: int | None = None,
  on_corrupt: str = "error",
) -> "BatchIterator":
  """Returns the training batches of this host from `start_step` on, without end.

  Args:
    source: the examples.
    transforms: from an example of the source to arrays of the same shape for each example.
    batch_size: of all hosts together; a multiple of `process_count`.
    seed: the order of the examples and all augmentation depend on it and on nothing else.
    start_step: the first step wanted; getting there costs nothing.
    process_index: this host.
    process_count: the number of hosts.
    num_workers: processes to prepare batches in; 0 uses threads of this one, which is faster up to
      a few cores, as decoding releases the interpreter lock.
    num_threads: threads in each process; by default the cores this process may use, shared among
      the workers, at most 16. Each holds one batch of this host in memory.
    num_classes: labels must lie below it; by default what the source says.
    on_corrupt: "error" stops at an image that cannot be decoded; "skip" takes another example,
      drawn at random from (seed, position), and counts the lost one in the iterator's `skipped`.

  Raises:
    ValueError: one line, about the batch size, an empty source, a label, a corrupt image, or
      examples of different shapes.
  """
  loader = _Loader(source, tuple(transforms), num_classes, on_corrupt, replace=True)
  local = _local_batch_size(source, batch_size, process_index, process_count, on_corrupt)
  dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
  # Batches of one host's size, in the order of their rows: host p takes every process_count-th.
  dataset = dataset.random_map(loader).batch(local, drop_remainder=True, batch_fn=_stack)
  dataset = dataset[start_step * process_count + process_index :: process_count]
  return BatchIterator(_iterate(dataset, num_workers, num_threads))


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
) -> "EvalBatches":
  """Returns the batches of this host that go over the source once, in its own order.

  Every host gets the same number of batches, all of the same size; `mask` (bool [b]) is True for
  real examples and False for the zeros that fill up the last batch. With `on_corrupt="skip"` an
  image that cannot be decoded becomes such a row too.

  The result has a length, and each `iter()` of it starts from the beginning. Arguments and errors
  are those of `train_batches`; random transforms draw the same numbers in every evaluation.
  """
  loader = _Loader(source, tuple(transforms), num_classes, on_corrupt, replace=False)
  local = _local_batch_size(source, batch_size, process_index, process_count, on_corrupt)
  num_batches = -(-len(source) // batch_size)
  dataset = grain.MapDataset.range(num_batches * batch_size).random_map(loader, seed=0)
  dataset = dataset.batch(local, batch_fn=_MaskedStack(loader))[process_index::process_count]
  return EvalBatches(dataset, num_workers, num_threads)


class BatchIterator(Iterator[Batch]):
  """Batches of one host. Close it, or use it in a `with`, when worker processes are involved.

  Attributes:
    skipped: how often each corrupt example has been met so far, by its name, in the batches that
      this iterator has handed out.
  """

  def __init__(self, iterator: grain.DatasetIterator) -> None:
    self.skipped: collections.Counter[str] = collections.Counter()
    self._iterator = iterator

  def __next__(self) -> Batch:
    batch = next(self._iterator)
    for name, reason in batch.pop(_SKIPPED):
      if name not in self.skipped:
        logging.warning("skipping a corrupt example, %s: %s", name, reason)
      self.skipped[name] += 1
    return batch

  @property
  def num_skipped(self) -> int:
    """How many rows so far lost their example."""
    return self.skipped.total()

  def close(self) -> None:
    """Stops threads and worker processes."""
    self._iterator.close()

  def __enter__(self) -> "BatchIterator":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


@dataclasses.dataclass
class EvalBatches:
  """The batches of an evaluation: `len()` of them, anew with each `iter()`."""

  _dataset: grain.MapDataset
  _num_workers: int
  _num_threads: int | None

  def __len__(self) -> int:
    return len(self._dataset)

  def __iter__(self) -> BatchIterator:
    return BatchIterator(_iterate(self._dataset, self._num_workers, self._num_threads))


@dataclasses.dataclass(frozen=True)
class _Skipped:
  """Stands for an example that could not be loaded, or for none at all."""

  failures: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Loader:
  """From a position in the source to a finished example; it travels to the workers."""

  source: Source
  transforms: tuple[Callable[[Example, np.random.Generator], Example], ...]
  num_classes: int | None
  on_corrupt: str
  replace: bool

  def __call__(self, index: int, rng: np.random.Generator) -> Example | _Skipped:
    """Loads example `index`; beyond the last one there is nothing."""
    if index >= len(self.source):
      return _Skipped()
    failures: list[tuple[str, str]] = []
    while len(failures) < MAX_REPLACEMENTS:
      try:
        return {**self.load(int(index), rng), _SKIPPED: tuple(failures)}
      except CorruptExampleError as error:
        name = self.source.example_name(int(index))
        if self.on_corrupt == "error":
          raise CorruptExampleError(
            f"corrupt example {name}: {error}; remove it, or set on_corrupt='skip'"
          ) from None
        failures.append((name, str(error)))
      if not self.replace:
        return _Skipped(tuple(failures))
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
    num_classes = self.num_classes or self.source.info.num_classes
    labels = np.asarray(example["label"])
    bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if np.any(bad):
      raise ValueError(
        f"{self.source.example_name(index)} has label {labels[bad].flat[0]}, expected 0.."
        f"{(num_classes or 0) - 1} (num_classes={num_classes}); check the labels or num_classes"
      )


def _as_array(value: Any) -> np.ndarray:
  """Returns the array to stack: int32 for Python ints, as no accelerator wants 64 bits."""
  return np.asarray(value, np.int32) if isinstance(value, int) else np.asarray(value)


def _stack(examples: Sequence[Any]) -> dict[str, Any]:
  """Returns the batch, and under `_skipped` what was lost on the way to it."""
  batch: dict[str, Any] = {_SKIPPED: sum((e[_SKIPPED] for e in examples), ())}
  for key in examples[0]:
    if key != _SKIPPED:
      batch[key] = _stack_key(key, [example[key] for example in examples])
  return batch


def _stack_key(key: str, values: list[np.ndarray]) -> np.ndarray:
  shapes = {value.shape for value in values}
  if len(shapes) > 1:
    remedy = {"image": "end the transforms with a resize or a crop", "label": "add multi_hot"}
    one, other = sorted(shapes)[:2]
    raise ValueError(
      f"{key!r} has different shapes in one batch, such as {one} and {other}; "
      f"{remedy.get(key, 'bring them to one shape in a transform')}"
    )
  return np.stack(values)


@dataclasses.dataclass
class _MaskedStack:
  """Stacks evaluation examples; rows without one are zeros, and False in `mask`."""

  loader: _Loader
  _template: Example | None = None

  def __call__(self, rows: Sequence[Example | _Skipped]) -> dict[str, Any]:
    mask = np.array([not isinstance(row, _Skipped) for row in rows])
    if not mask.all():
      blank = self._blank(rows)
      lost = [row.failures for row in rows if isinstance(row, _Skipped)]
      rows = [blank if isinstance(row, _Skipped) else row for row in rows]
      return {**_stack(rows), "mask": mask, _SKIPPED: sum(lost, ())}
    return {**_stack(rows), "mask": mask}

  def _blank(self, rows: Sequence[Example | _Skipped]) -> Example:
    """Returns zeros shaped like the examples: of these rows, or else the first sound one of all."""
    if self._template is None:
      found = (row for row in rows if not isinstance(row, _Skipped))
      self._template = next(found, None) or self._first_sound()
    blank = {k: np.zeros_like(v) for k, v in self._template.items() if k != _SKIPPED}
    return {**blank, _SKIPPED: ()}

  def _first_sound(self) -> Example:
    for index in range(min(len(self.loader.source), MAX_REPLACEMENTS)):
      example = self.loader(index, np.random.default_rng(0))
      if not isinstance(example, _Skipped):
        return example
    raise CorruptExampleError(
      f"the first {index + 1} examples of {self.loader.source.info.name} are all corrupt"
    )


def _local_batch_size(
  source: Source, batch_size: int, process_index: int, process_count: int, on_corrupt: str
) -> int:
  """Returns the rows of one host, after checking what all hosts were given."""
  if on_corrupt not in CORRUPT_POLICIES:
    raise ValueError(unknown_name("policy for corrupt examples", on_corrupt, CORRUPT_POLICIES))
  if len(source) == 0:
    raise ValueError(f"{source.info.name} holds no example")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} is not a positive multiple of the {process_count} processes"
    )
  return batch_size // process_count


def _iterate(
  dataset: grain.MapDataset, num_workers: int, num_threads: int | None
) -> grain.DatasetIterator:
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, also where there is no absl app
  threads = num_threads or max(1, min(16, _available_cores() // max(1, num_workers)))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  batches = dataset.to_iter_dataset(options)
  if num_workers:
    processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    batches = batches.mp_prefetch(processes)
  return iter(batches)


def _available_cores() -> int:
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on macOS
    return os.cpu_count() or 1
