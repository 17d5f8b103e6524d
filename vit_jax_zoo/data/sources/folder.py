"""Your own images: a folder for each class.

    flowers/daisy/01.jpg  flowers/rose/17.png                    split by a hash of the file name
    flowers/train/daisy/01.jpg  flowers/test/rose/17.png         split as the folders say

The held-out folder may be `test`, `val`, `valid` or `validation`. The last three are one name:
where one of them is there, the others mean it. Where only a test set or only a validation set is
there, all four names mean it, so a config written for either works.

Without `train/` there is a fixed random split: 90 % `train`, 10 % `test`, decided by a hash of each
file's path below the root, so that it is the same on every machine, and adding files moves none of
the others. `all` is both; `val`, `valid` and `validation` are `test`, as above. Examples are
ordered by the same hash: any slice mixes the classes.

For whoever chooses between models, or checkpoints, `train` is also cut in two, by the same hash:
`fit`, to learn from, and `choose`, a tenth of all or so. With folders for training, validation and
test, these two are the first and the second of them, as they are.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from absl import logging

from vit_jax_zoo.data.sources.base import (
  VALIDATION_NAMES,
  DatasetInfo,
  Example,
  Source,
  Splits,
  name_validation,
)

IMAGE_SUFFIXES = frozenset(
  (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
SPLIT_FOLDERS = ("train", "test", *VALIDATION_NAMES)
TEST_FRACTION = 0.1
CHOOSE_FRACTION = 0.1

_NAMED = 5
"""So many ignored files are named."""


class FolderSource(Source):
  """Image files, each with the class of the folder it lies in. `image` is the file's bytes."""

  def __init__(self, info: DatasetInfo, root: str, files: list[tuple[str, int]]) -> None:
    self.info = info
    self._root = root
    self._files = files

  def __getitem__(self, index: int) -> Example:
    with open(self.example_name(index), "rb") as file:
      return {"image": file.read(), "label": self._files[index][1]}

  def labels(self) -> np.ndarray:
    """Returns the number of each file's class."""
    return np.array([label for _, label in self._files], np.int64)

  def example_name(self, index: int) -> str:
    """Returns the path of the file."""
    return os.path.join(self._root, self._files[index][0])

  def part(self, *, chosen: bool) -> "FolderSource":
    """Returns the files that are held out to choose by, those with the highest hashes; or the rest.

    At least one is held out.

    Raises:
      ValueError: there are not two files.
    """
    if len(self._files) < 2:
      raise ValueError(
        f"{self.info.name} has {len(self._files)} image to train on, and none to choose by; "
        "expected at least 2, and better dozens of each class"
      )
    first = sum(_hash(path) < (1 - CHOOSE_FRACTION) * 2**64 for path, _ in self._files)
    if first == len(self._files):
      first -= 1
    files = self._files[first:] if chosen else self._files[:first]
    return FolderSource(dataclasses.replace(self.info, num_examples=len(files)), self._root, files)


FolderSplits: TypeAlias = Mapping[str, Callable[[], FolderSource]]


def open_splits(location: str, class_names: Sequence[str] | str | None = None) -> Splits:
  """Finds the images below a folder; splits also go by their other names.

  Args:
    location: the folder, on a disk of this machine.
    class_names: the classes in the order of their labels, or a text file with one on each line,
      when labels must agree with a published model's. Without it, folder names in sorted order.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it is not local, or holds no class folders, no images, or a class that `class_names`
      lacks.
  """
  splits = find_splits(location, class_names)
  return _name_test(name_validation(_name_choices(splits)), location)


def find_splits(location: str, class_names: Sequence[str] | str | None = None) -> FolderSplits:
  """Finds the images below a folder, as `open_splits`; each split has one name, its folder's."""
  if "://" in location:
    raise ValueError(
      f"folder:{location} is not on a local disk; copy it there, or pack it with python -m "
      "vit_jax_zoo.data.prepare --from_folder and read it as tfds:gs://bucket/name/1.0.0"
    )
  root = pathlib.Path(location).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(
      f"folder:{location} is not a folder; expected one folder for each class, with images inside "
      "(demo:photos needs no files)"
    )
  names = read_names(class_names)
  folders = [root / name for name in SPLIT_FOLDERS if (root / name).is_dir()]
  if root / "train" not in folders:
    folders = []
  found = {folder: _scan(folder) for folder in folders or [root]}
  if not any(found.values()):
    raise ValueError(
      f"{root} holds no images in class folders; expected {root}/<class>/<image>, with one of "
      f"{', '.join(sorted(IMAGE_SUFFIXES))}"
    )
  names = names or tuple(sorted({name for files in found.values() for _, name in files}))
  whole = DatasetInfo(f"folder:{location}", 0, len(names), names)
  if folders:
    splits = {f.name: _labelled(f, files, names) for f, files in found.items() if files}
    return {n: functools.partial(_open, whole, root / n, splits[n]) for n in splits}
  return _hashed_splits(whole, root, _labelled(root, found[root], names))


def _name_choices(splits: FolderSplits) -> Splits:
  """Adds `fit` and `choose`: what to learn from, and what to choose a checkpoint by."""
  validation = [name for name in VALIDATION_NAMES if name in splits]
  if "train" not in splits:
    return splits
  if "test" in splits and len(validation) == 1:
    return {**splits, "fit": splits["train"], "choose": splits[validation[0]]}
  train = splits["train"]
  return {
    **splits,
    "fit": lambda: train().part(chosen=False),
    "choose": lambda: train().part(chosen=True),
  }


def _name_test(splits: Splits, location: str) -> Splits:
  """Lets the test set stand for a validation set where there is none, and the other way round.

  A dataset of TFDS is not treated so: there, what a published number was measured on must be named.
  Where there is neither, whoever asks for one is told what to do.
  """
  validation = {splits[name] for name in VALIDATION_NAMES if name in splits}
  if "test" in splits and not validation:
    return {**splits, **dict.fromkeys(VALIDATION_NAMES, splits["test"])}
  if "test" not in splits and len(validation) == 1:
    return {**splits, "test": validation.pop()}
  if "test" not in splits and not validation:
    absent = functools.partial(_nothing_held_out, location)
    return {**splits, **dict.fromkeys(("test", *VALIDATION_NAMES), absent)}
  return splits


def _nothing_held_out(location: str) -> Source:
  raise ValueError(
    f"folder:{location} has images in train/, but none in test/ or val/; add one of them, or give "
    f"folder:{location.rstrip('/')}/train, of which a tenth is then held out"
  )


def _hashed_splits(
  whole: DatasetInfo, root: pathlib.Path, files: list[tuple[str, int]]
) -> FolderSplits:
  # Of a dozen files there may be none with a hash so small: then it is the smallest.
  test = [file for file in files if _hash(file[0]) < TEST_FRACTION * 2**64] or files[:1]
  train = files[len(test) :]  # they are in the order of their hashes
  splits = {"train": train, "test": test, "all": files}
  return {name: functools.partial(_open, whole, root, splits[name]) for name in splits}


def _open(whole: DatasetInfo, root: pathlib.Path, files: list[tuple[str, int]]) -> FolderSource:
  return FolderSource(dataclasses.replace(whole, num_examples=len(files)), str(root), files)


def read_names(class_names: Sequence[str] | str | None) -> tuple[str, ...]:
  """Returns the class names that were given, or that stand in the file of that name."""
  if isinstance(class_names, str):
    text = pathlib.Path(class_names).expanduser().read_text()
    class_names = [line.strip() for line in text.splitlines() if line.strip()]
  return tuple(class_names or ())


def _scan(root: pathlib.Path) -> list[tuple[str, str]]:
  """Returns (path below the root, class) of every image in a class folder, ordered by hash."""
  found: list[tuple[str, str]] = []
  ignored: list[str] = []
  for folder in sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")):
    for parent, _, files in os.walk(folder):
      below = os.path.relpath(parent, root)
      images = [f for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]
      ignored += sorted(os.path.join(below, f) for f in set(files) - set(images))
      found += [(pathlib.PurePath(below, f).as_posix(), folder.name) for f in images]
  if ignored:
    _say_ignored(root, tuple(ignored))
  return sorted(found, key=lambda file: (_hash(file[0]), file[0]))


@functools.cache  # each split of a run reads the folder anew
def _say_ignored(root: pathlib.Path, ignored: tuple[str, ...]) -> None:
  named = ", ".join(ignored[:_NAMED]) + (", ..." if len(ignored) > _NAMED else "")
  logging.info("%s: files that are not images and were ignored (%d): %s", root, len(ignored), named)


def _labelled(
  root: pathlib.Path, files: list[tuple[str, str]], names: tuple[str, ...]
) -> list[tuple[str, int]]:
  labels = {name: label for label, name in enumerate(names)}
  unknown = sorted({name for _, name in files} - set(labels))
  if unknown:
    raise ValueError(
      f"{root / unknown[0]} is not one of the {len(names)} class_names; the list must name every "
      f"class folder ({len(unknown)} are missing)"
    )
  return [(path, labels[name]) for path, name in files]


def _hash(path: str) -> int:
  """Returns a number in [0, 2**64) that depends on the path alone."""
  return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")
