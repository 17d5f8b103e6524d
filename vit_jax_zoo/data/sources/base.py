"""Base class of sources of examples, their description and their splits.

Splits are written as in TFDS: `train`, `train[:99%]`, `train[1000:2000]`, `train+test`. `minitrain`
is `train[:99%]` and `minival` is `train[99%:]`. `val`, `valid` and `validation` are aliases of the
one that a dataset has.
"""

import abc
import bisect
import dataclasses
import itertools
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vit_jax_zoo.errors import escape_surrogates, unknown_name

Example: TypeAlias = dict[str, Any]
"""`image`: encoded bytes or uint8 [h w 3]; `label`: an int, or several of them for multi-label."""

ALIASES = {"minitrain": "train[:99%]", "minival": "train[99%:]"}
VALIDATION_NAMES = ("val", "valid", "validation")

_PART = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class CorruptExampleError(ValueError):
  """An example that cannot be read; `data.loader.on_corrupt` stops the run or skips it."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """Metadata of a source; surrogates in names are escaped."""

  name: str  # as it was loaded, with the split: "demo:digits train[:90%]"
  num_examples: int
  num_classes: int | None = None  # None without labels, or if unknown
  class_names: tuple[str, ...] = ()  # one for each class, or empty
  max_objects: int | None = None  # largest number of annotated objects in an image, if known
  num_objects: int | None = None  # annotated, without crowds, if known; of a slice: at most
  annotations: str = ""  # hash of the annotation file, if there is one
  stuff_from: int | None = None  # of panoptic data, the first class id that is stuff, if known

  def __post_init__(self) -> None:
    object.__setattr__(self, "name", escape_surrogates(self.name))
    object.__setattr__(self, "class_names", tuple(map(escape_surrogates, self.class_names)))


class Source(abc.ABC):
  """Examples by index. Pickled to worker processes, so it keeps paths, not open files."""

  info: DatasetInfo
  assumption: str = ""  # of fake data: what was assumed of the real ones; see `fake_data`

  def __len__(self) -> int:
    return self.info.num_examples

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Example:
    """Returns example `index`, 0 <= index < len(self)."""

  def example_name(self, index: int) -> str:
    """Returns the example's name in error messages: its file, or its split and index."""
    return f"{self.info.name}[{index}]"

  def labels(self) -> np.ndarray | None:
    """Returns the labels of all examples, int [n], if known without reading them."""
    return None

  def missing(self) -> Sequence[int]:
    """Returns the examples whose files are missing, if known without reading them."""
    return ()

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns height and width of the example's image, without decoding it."""
    from vit_jax_zoo.data import images  # imports this module's errors

    image = self[index]["image"]
    return images.image_size(image) if isinstance(image, bytes) else image.shape[:2]


def local_folder(kind: str, location: str, expected: str) -> pathlib.Path:
  """Returns a source's folder; FileNotFoundError, with what is expected in it, if there is none."""
  root = pathlib.Path(location).expanduser()
  if "://" in location or not root.is_dir():
    raise FileNotFoundError(f"{kind}:{location} is no folder on a local disk; expected {expected}")
  return root


def composed(name: str) -> str:
  """Returns a name with composed accents (NFC), for comparisons; macOS decomposes them."""
  return unicodedata.normalize("NFC", name)


def file_path(folder: str, name: str) -> str:
  """Returns the path of a file below a folder, whose accents may be composed or not on the disk."""
  path = os.path.join(folder, name)
  if name.isascii() or os.path.lexists(path):
    return path
  others = (os.path.join(folder, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
  return next(filter(os.path.lexists, others), path)


def cache_dir() -> pathlib.Path:
  """Returns `$VIT_JAX_ZOO_CACHE`, or `vit_jax_zoo` below `$XDG_CACHE_HOME` or `~/.cache`."""
  default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vit_jax_zoo"
  return pathlib.Path(os.environ.get("VIT_JAX_ZOO_CACHE", default)).expanduser()


def missing_files(files: Sequence[Sequence[str]]) -> list[int]:
  """Returns the indices of examples that have a missing file; lists each folder once."""
  folders = {os.path.dirname(file) for example in files for file in example}
  entries = (entry for folder in filter(os.path.isdir, folders) for entry in os.scandir(folder))
  existing = {entry.path for entry in entries if entry.is_file(follow_symlinks=False)}
  return [
    index
    for index, example in enumerate(files)
    if not all(file in existing or os.path.isfile(file) for file in example)
  ]


Splits: TypeAlias = Mapping[str, Callable[[], Source]]  # by name, opened on demand


def name_validation(splits: Splits) -> Splits:
  """Adds the aliases of the validation split, if there is exactly one."""
  names = [name for name in VALIDATION_NAMES if name in splits]
  if len(names) != 1:
    return splits
  return {**splits, **dict.fromkeys(VALIDATION_NAMES, splits[names[0]])}


class SlicedSource(Source):
  """Concatenation of ranges of other sources."""

  def __init__(self, name: str, parts: list[tuple[Source, range]]) -> None:
    self._parts = parts
    self._ends = list(itertools.accumulate(len(indices) for _, indices in parts))
    infos = [source.info for source, _ in parts]
    largest, objects = [i.max_objects for i in infos], [i.num_objects for i in infos]
    self.info = dataclasses.replace(
      parts[0][0].info,
      name=name,
      num_examples=self._ends[-1],
      max_objects=None if None in largest else max(filter(None, largest), default=0),
      num_objects=None if None in objects else sum(filter(None, objects)),
      annotations=" ".join(dict.fromkeys(i.annotations for i in infos)),
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
    source, position = self._find(index)
    return source.example_name(position)

  def labels(self) -> np.ndarray | None:
    found = []
    for source, indices in self._parts:
      if (labels := source.labels()) is None:
        return None
      found.append(labels[list(indices)])
    return np.concatenate(found)

  def missing(self) -> list[int]:
    found = []
    for end, (source, indices) in zip(self._ends, self._parts, strict=True):
      found += [end - len(indices) + indices.index(i) for i in source.missing() if i in indices]
    return found

  def image_size(self, index: int) -> tuple[int, int]:
    source, position = self._find(index)
    return source.image_size(position)


def select_split(splits: Splits, split: str, dataset: str) -> Source:
  """Returns the examples of a split specification; ValueError for a wrong or empty one."""
  parts = []
  for text in (ALIASES.get(p, p) if p not in splits else p for p in split.split("+")):
    match = _PART.fullmatch(text.strip())
    if match is None:
      example = "'train', 'train[:99%]', 'train[1000:2000]' or 'train+test'"
      raise ValueError(f"{dataset}: malformed split {split!r}; expected {example}")
    if match["name"] not in splits:
      raise ValueError(f"{dataset}: {unknown_name('split', match['name'], splits)}")
    source = splits[match["name"]]()
    start, stop = (_position(match[end], len(source)) for end in ("start", "stop"))
    parts.append((source, range(len(source))[start:stop]))
  if not any(len(indices) for _, indices in parts):
    raise ValueError(f"{dataset}: the split {split!r} has no example")
  return SlicedSource(f"{dataset} {split}", parts)


def join_sources(sources: Sequence[Source]) -> Source:
  """Returns the concatenation of sources of the same classes; ValueError for other classes."""
  first, *others = sources
  for other in others:
    check_same_classes(first.info, other.info, f"extra_sources: {other.info.name}")
    ours, theirs = first.info.num_classes, other.info.num_classes
    if None not in (ours, theirs) and ours != theirs:
      expected = f"the {ours} of {first.info.name}, in the same order"
      raise ValueError(f"extra_sources: {other.info.name}: {theirs} classes; expected {expected}")
  if not others:
    return first
  name = " + ".join(source.info.name for source in sources)
  return SlicedSource(name, [(source, range(len(source))) for source in sources])


def check_same_classes(train: DatasetInfo, other: DatasetInfo, name: str) -> None:
  """Raises ValueError, with the first difference, if two sources have different class names."""
  ours, theirs = train.class_names, other.class_names
  if not ours or not theirs or ours == theirs:
    return
  pairs = itertools.zip_longest(ours, theirs)
  label, pair = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
  one, another = ("no class" if class_name is None else repr(class_name) for class_name in pair)
  raise ValueError(
    f"{name} has other classes than the training data: label {label} is {one} in {train.name} "
    f"({len(ours)} classes) and {another} in {other.name} ({len(theirs)}); use the same, in order"
  )


def _position(text: str | None, length: int) -> int | None:
  if text is not None and text.endswith("%"):  # rounded to the nearest example
    return round(int(text[:-1]) * length / 100)
  return None if text is None else int(text)
