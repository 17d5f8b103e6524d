"""What every source of examples has in common: its interface, its description, its splits.

A split is written as TFDS writes it: `train`, `train[:99%]`, `train[1000:2000]`, `train+test`. Two
names stand for the usual way to hold out a part of a training set that has no validation split:
`minitrain` is `train[:99%]` and `minival` is `train[99%:]`. `val`, `valid` and `validation` mean
the same split, whichever of them a dataset has.
"""

import abc
import bisect
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vit_jax_zoo.errors import unknown_name

Example: TypeAlias = dict[str, Any]
"""`image`: encoded bytes or uint8 [h w 3]; `label`: an int, or several of them for multi-label."""

ALIASES = {"minitrain": "train[:99%]", "minival": "train[99%:]"}

VALIDATION_NAMES = ("val", "valid", "validation")

_PART = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class CorruptExampleError(ValueError):
  """An example whose data cannot be used. The pipeline names it, and skips it if told to."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a source without reading its examples.

  Attributes:
    name: what it was loaded as, with the split: "demo:digits train[:90%]".
    num_examples: how many there are.
    num_classes: how many classes the labels come from; None when the source has no labels, or
      labels of no stated range.
    class_names: one name for each class, or empty when there are none.
    max_objects: largest number of annotated objects in an image; None if unknown.
    stuff_from: of panoptic data, the first class id that is stuff; None if unknown.
  """

  name: str
  num_examples: int
  num_classes: int | None = None
  class_names: tuple[str, ...] = ()
  max_objects: int | None = None
  stuff_from: int | None = None


class Source(abc.ABC):
  """Examples by index. It travels to worker processes by pickle, so it holds paths, not files.

  Attributes:
    info: what is known of it.
    assumption: of data that only stand in for others, what was assumed of these; see `stand_in`.
  """

  info: DatasetInfo
  assumption: str = ""

  def __len__(self) -> int:
    return self.info.num_examples

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Example:
    """Returns example `index`, 0 <= index < len(self)."""

  @abc.abstractmethod
  def example_name(self, index: int) -> str:
    """Returns what an error message calls this example: its file, or its split and position."""

  def labels(self) -> np.ndarray | None:
    """Returns the label of every example, int [n], where that takes reading none of them."""
    return None

  def missing(self) -> Sequence[int]:
    """Returns the examples whose files are not there, where names alone show it."""
    return ()

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns height and width of the example's image, without decoding it."""
    from vit_jax_zoo.data import images  # which in turn knows the errors of this module

    image = self[index]["image"]
    return images.image_size(image) if isinstance(image, bytes) else image.shape[:2]


Splits: TypeAlias = Mapping[str, Callable[[], Source]]
"""The whole splits of a dataset by name, opened on demand."""


def name_validation(splits: Splits) -> Splits:
  """Returns the splits, the validation split by all of its names if there is exactly one."""
  names = [name for name in VALIDATION_NAMES if name in splits]
  if len(names) != 1:
    return splits
  return {**splits, **dict.fromkeys(VALIDATION_NAMES, splits[names[0]])}


class SlicedSource(Source):
  """Ranges of other sources, one after the other."""

  def __init__(self, name: str, parts: list[tuple[Source, range]]) -> None:
    self._parts = parts
    self._ends = list(itertools.accumulate(len(indices) for _, indices in parts))
    counts = [source.info.max_objects for source, _ in parts]
    self.info = dataclasses.replace(
      parts[0][0].info,
      name=name,
      num_examples=self._ends[-1],
      max_objects=None if None in counts else max(filter(None, counts), default=0),
    )
    assumptions = (source.assumption for source, _ in parts)
    self.assumption = "; ".join(dict.fromkeys(filter(None, assumptions)))

  def _find(self, index: int) -> tuple[Source, int]:
    if not 0 <= index < len(self):
      raise IndexError(f"{self.info.name} has {len(self)} examples; there is no number {index}")
    part = bisect.bisect_right(self._ends, index)
    source, indices = self._parts[part]
    return source, indices[index - self._ends[part]]

  def __getitem__(self, index: int) -> Example:
    source, position = self._find(index)
    return source[position]

  def example_name(self, index: int) -> str:
    """Returns the name that the example has in the source it comes from."""
    source, position = self._find(index)
    return source.example_name(position)

  def labels(self) -> np.ndarray | None:
    """Returns those of its parts, if all of them know theirs."""
    known = [source.labels() for source, _ in self._parts]
    found = [x for x in known if x is not None]
    if len(found) < len(known):
      return None
    pairs = zip(found, self._parts, strict=True)
    return np.concatenate([labels[list(indices)] for labels, (_, indices) in pairs])

  def missing(self) -> list[int]:
    """Returns the missing examples of all parts."""
    found = []
    for end, (source, indices) in zip(self._ends, self._parts, strict=True):
      start = end - len(indices)
      found += [start + indices.index(i) for i in source.missing() if i in indices]
    return found

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns the size that the source of the example returns."""
    source, position = self._find(index)
    return source.image_size(position)


def select_split(splits: Splits, split: str, dataset: str) -> Source:
  """Returns the examples that a split specification asks for.

  Args:
    splits: the whole splits of the dataset.
    split: one split, a slice of one, or several joined with `+`. Percentages are rounded to the
      nearest example; negative positions count from the end.
    dataset: the name under which the user asked for the dataset.

  Raises:
    ValueError: the specification cannot be read, names no split of this dataset, or is empty.
  """
  parts = []
  for text in (ALIASES.get(p, p) if p not in splits else p for p in split.split("+")):
    match = _PART.fullmatch(text.strip())
    if match is None:
      raise ValueError(
        f"cannot read the split {split!r} of {dataset}; write it as 'train', 'train[:99%]', "
        "'train[1000:2000]' or 'train+test'"
      )
    if match["name"] not in splits:
      raise ValueError(f"{dataset}: {unknown_name('split', match['name'], splits)}")
    source = splits[match["name"]]()
    start, stop = (_position(match[end], len(source)) for end in ("start", "stop"))
    parts.append((source, range(len(source))[start:stop]))
  if not any(len(indices) for _, indices in parts):
    raise ValueError(f"the split {split!r} of {dataset} holds no example")
  return SlicedSource(f"{dataset} {split}", parts)


def join_sources(sources: Sequence[Source]) -> Source:
  """Returns the examples of all sources, one source after the other; training shuffles them.

  Raises:
    ValueError: a label does not mean the same class in all of them.
  """
  first, *others = sources
  for other in others:
    check_same_classes(first.info, other.info, f"{other.info.name}, mixed in,")
    known = (first.info.num_classes, other.info.num_classes)
    if None not in known and known[0] != known[1]:
      raise ValueError(
        f"{other.info.name}, mixed in, has {known[1]} classes and {first.info.name} has {known[0]};"
        " both need the same classes in the same order"
      )
  if not others:
    return first
  name = " + ".join(source.info.name for source in sources)
  return SlicedSource(name, [(source, range(len(source))) for source in sources])


def check_same_classes(train: DatasetInfo, other: DatasetInfo, name: str) -> None:
  """Checks that a label means the same class in two sources.

  Sources without names for their classes pass: nothing is known that could differ.

  Args:
    train: what a model is trained on.
    other: what it is scored on.
    name: what the message calls the other: "the evaluation 'val'".

  Raises:
    ValueError: both name their classes, and not alike; the message has the first difference.
  """
  ours, theirs = train.class_names, other.class_names
  if not ours or not theirs or ours == theirs:
    return
  pairs = itertools.zip_longest(ours, theirs)
  label, pair = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
  one, another = ("no class" if class_name is None else repr(class_name) for class_name in pair)
  raise ValueError(
    f"{name} has other classes than the training data: label {label} is {one} in {train.name} "
    f"({len(ours)} classes) and {another} in {other.name} ({len(theirs)} classes); use the same "
    "classes in the same order"
  )


def _position(text: str | None, length: int) -> int | None:
  if text is None:
    return None
  if text.endswith("%"):
    return round(int(text[:-1]) * length / 100)
  return int(text)
