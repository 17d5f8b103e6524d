"""Image classification from your own images: a folder for each class.

    flowers/daisy/01.jpg  flowers/rose/17.png                    split by a hash of the file name
    flowers/train/daisy/01.jpg  flowers/test/rose/17.png         split by folder

Split folders are `train` or `training`, `test` or `testing`, `val`, `valid`, `validation`, `dev` or
`eval`, in any case, also `train_set`, `train-data`, `train images`, `seg_train`, `train2017`.
`val`, `valid` and `validation` are aliases of the one that exists; with only a test set or only a
validation set, all four names are aliases of it. Class names are normalised (NFC).

Without split folders, 10 % of the images, and one or more of each class of two or more, are `test`
and the rest `train`, by a hash of each file's path below the root: the same on every machine, and
stable when files are added. `all` is both; `val`, `valid` and `validation` are `test`. Examples are
in the order of the hash, so that any slice mixes the classes.

To choose a model or checkpoint, `train` is split further by the hash: `fit` to train on, and
`choose`, a tenth. With folders for training, validation and test they are the first two.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging

from vit_jax_zoo.data.images import read_file, suffixes
from vit_jax_zoo.data.sources import base

SPLIT_FOLDERS = {
  "train": "train", "training": "train", "test": "test", "testing": "test",
  "dev": "val", "eval": "val",
  **{name: name for name in base.VALIDATION_NAMES},
}  # fmt: skip

TEST_FRACTION = 0.1
CHOOSE_FRACTION = 0.1

Labelled: TypeAlias = list[tuple[str, int]]  # paths below a folder, and labels

_LISTED = 5  # maximum number of files or classes in a message
_SYSTEM_FOLDERS = (
  "__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information",
)  # fmt: skip

_CONTAINERS = ("data", "dataset", "datasets", "images", "imgs", "photos", "pictures")

_warn_once = functools.cache(logging.warning)
_log_once = functools.cache(logging.info)  # each split of a run lists the folder again


class FileSource(base.Source):
  """Examples of `files`: an image's path below a folder, and the rest of the example."""

  def __init__(self, info: base.DatasetInfo, root: str | os.PathLike, files: list[Any]) -> None:
    self.info = dataclasses.replace(info, num_examples=len(files))
    self._root, self._files = os.fspath(root), files

  def example_name(self, index: int) -> str:
    return os.path.join(self._root, self._files[index][0])

  def read(self, file: str) -> bytes:
    return read_file(os.path.join(self._root, file))


def list_images(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
  """Returns the image files below a folder, following links, and the ignored ones.

  Paths are those below the folder, with "/", sorted. Images are regular files with one of
  `images.suffixes()`; ignored dangling links and special files have the reason. Skipped are hidden
  entries, `_SYSTEM_FOLDERS`, links to folders above and, with a warning, unreadable entries.
  """
  images, ignored = [], []
  above = pathlib.Path(os.path.abspath(folder)).parent.resolve()
  for path, reason in _walk(os.fspath(folder), "", (str(above), *map(str, above.parents))):
    is_image = not reason and os.path.splitext(path)[1].lower() in suffixes()
    (images if is_image else ignored).append(path + reason)
  return sorted(images), sorted(ignored)


def _walk(folder: str, below: str, parents: tuple[str, ...]) -> Iterator[tuple[str, str]]:
  """Yields the path of each file and why it cannot be read, or an empty text."""
  real = os.path.realpath(folder)
  if real in parents:  # a link to a folder above it
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      path = f"{below}{entry.name}"
      if _is_hidden(entry.name):
        continue
      try:
        if entry.is_dir():
          yield from _walk(entry.path, f"{path}/", (*parents, real))
        elif entry.is_file():
          yield path, ""
        else:
          yield path, " (dangling link)" if entry.is_symlink() else " (not a regular file)"
      except OSError as error:  # a link to itself, a folder that cannot be listed
        _warn_once(f"{entry.path}: skipped; {error.strerror}")


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def log_ignored(folder: str | os.PathLike, ignored: Sequence[str]) -> None:
  """Logs the files of a folder that are not images, once for each folder."""
  if ignored:
    named = ", ".join(ignored[:_LISTED]) + (", ..." if len(ignored) > _LISTED else "")
    _log_once(f"{folder}: ignored {len(ignored)} files that are not images: {named}")


def read_class_names(class_names: Sequence[str] | str | None) -> tuple[str, ...]:
  """Returns class names: those given, or those in a text file of one a line or a JSON list."""
  if not isinstance(class_names, str):
    return tuple(class_names or ())
  file = pathlib.Path(class_names).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"class_names: there is no file {file}; expected one name per line")
  try:
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
      return tuple(map(str, json.loads(text)))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"class_names: {file}: neither UTF-8 nor a JSON list ({error})") from None
  return tuple(line.strip() for line in text.splitlines() if line.strip())


class FolderSource(FileSource):
  """Image files with the class of their folder. `image` is the file's bytes."""

  def __getitem__(self, index: int) -> base.Example:
    path, label = self._files[index]
    return {"image": self.read(path), "label": label}

  def labels(self) -> np.ndarray:
    return np.array([label for _, label in self._files], np.int64)

  def part(self, *, chosen: bool) -> "FolderSource":
    """Returns the held-out part (`chosen`) or the rest; ValueError for fewer than two files."""
    if len(self._files) < 2:
      raise ValueError(f"{self.info.name}: {len(self._files)} training image; add some to hold out")
    parts = hold_out(self._files, CHOOSE_FRACTION, highest=True)
    return FolderSource(self.info, self._root, parts[chosen])


FolderSplits: TypeAlias = Mapping[str, Callable[[], FolderSource]]


def open_splits(location: str, class_names: Sequence[str] | str | None = None) -> base.Splits:
  """Finds the images below a local folder.

  `class_names` in the order of their labels, or in a text file of one a line, are needed where
  labels must agree with a published model's. Default: folder names in sorted order.
  FileNotFoundError without the folder; ValueError for a remote one, or one without class folders or
  images, or with a class that `class_names` lacks.
  """
  splits = find_splits(location, class_names)
  return _name_test(base.name_validation(_name_choices(splits)), location)


def find_splits(location: str, class_names: Sequence[str] | str | None = None) -> FolderSplits:
  """Returns the splits of `open_splits` without their aliases."""
  if "://" in location:
    raise ValueError(
      f"folder:{location} is not on a local disk; copy it there, or pack it with python -m "
      "vit_jax_zoo.data.prepare --from_folder and read it as tfds:gs://bucket/name/1.0.0"
    )
  expected = "one folder for each class, with images inside (demo:photos needs no files)"
  root = base.local_folder("folder", location, expected)
  folders = _split_folders(root) or {"": root}
  found = {name: _scan(folder) for name, folder in folders.items()}
  every = sorted({name for files in found.values() for _, name in files})
  if not every:
    known = ", ".join(sorted(suffixes()))
    raise ValueError(f"{root} has no images in class folders; expected <class>/<image>, of {known}")
  if "" in found and len(every) == 1:
    _check_not_wrapped(root / every[0], location)
  if not (names := read_class_names(class_names)):
    _check_inner_folders(root, found.get("", []))
    _check_names_differ(root, every)
    names = tuple(every)
  whole = base.DatasetInfo(f"folder:{location}", 0, len(names), names)
  labelled = {s: _labelled(folders[s], files, names) for s, files in found.items() if files}
  if "" in labelled:
    labelled = _hashed_splits(root, labelled[""], names)
  return {
    split: functools.partial(FolderSource, whole, folders.get(split, root), files)
    for split, files in labelled.items()
  }


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the folders of splits, which have class folders inside; none if `train` is a class."""
  folders = _folders(root)
  named = [f for f in folders if _split_of(f.name)]
  nested = [f for f in named if _folders(f)]
  splits: dict[str, pathlib.Path] = {}
  for folder in nested:
    split = _split_of(folder.name) or ""
    if split in splits:
      raise ValueError(f"{splits[split]} and {folder} are both the split {split!r}; keep one")
    inner = _folders(folder)  # archives of Kaggle repeat the name: train/train/<class>
    repeated = [f.name for f in inner] == [folder.name] and _folders(inner[0])
    splits[split] = inner[0] if repeated else folder
  if "train" in splits or (splits and len(nested) == len(folders)):
    others = ", ".join(f.name for f in folders if f not in nested)
    if others:
      _warn_once(f"{root}: ignored folders next to the split folders: {others}")
    return splits
  if splits or len({_split_of(f.name) for f in named}) > 1:
    others = ", ".join(f.name for f in folders if f not in nested)
    expected = f"{named[0].name}/<class>/<image>"
    raise ValueError(f"{root}: {others}: not splits with class folders; expected {expected}")
  return {}


def _split_of(name: str) -> str | None:
  name = re.sub(r"[-_ ]?(set|data|images|(19|20)\d\d)$", "", name.lower())
  return SPLIT_FOLDERS.get(re.sub(r"^(seg|data|dataset|images?)[-_ ]", "", name))


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(f for f in root.iterdir() if f.is_dir() and not _is_hidden(f.name))


def _check_not_wrapped(inner: pathlib.Path, location: str) -> None:
  """Refuses a folder whose only folder holds the dataset."""
  inside = _folders(inner)
  while len(inside) == 1 and _folders(inside[0]):
    inner, location = inside[0], f"{location.rstrip('/')}/{inner.name}"
    inside = _folders(inner)
  splits = any(_split_of(f.name) for f in inside)
  if splits or (len(inside) > 1 and all("/" in path for path in list_images(inner)[0])):
    raise ValueError(
      f"folder:{location} has a single class folder, {inner.name}, with the folders "
      f"{', '.join(f.name for f in inside[:_LISTED])}; did you mean "
      f"folder:{location.rstrip('/')}/{inner.name}?"
    )


def _check_inner_folders(root: pathlib.Path, files: Sequence[tuple[str, str]]) -> None:
  """Refuses splits, folds or a whole dataset that would become classes, and splits in classes."""
  inside: dict[str, set[str]] = {}
  for top, *below in (path.split("/") for path, _ in files):
    inside.setdefault(top, set()).add("".join(below[:-1][:1]))  # empty: an image of `top` itself
  first: dict[str, str] = {}  # folders by the folders inside
  for top, names in sorted(inside.items()):
    listed = ", ".join((folders := sorted(names - {""}))[:_LISTED])
    if len(inside) > 1 and len(folders) > 1 and top.lower() in _CONTAINERS:
      raise ValueError(
        f"{root}: {top}/ has the folders {listed}; did you mean folder:{root / top}?"
      )
    alike = {top} if len(set(map(_split_of, folders)) - {None}) > 1 else set()
    for other in {first.setdefault(name, top) for name in folders} - {top}:
      several = len(names | inside[other]) > 1 and "" not in names | inside[other]
      alike |= {other, top} if several or len((names & inside[other]) - {""}) > 1 else set()
    if alike:
      wrong = f"{root}: {', '.join(sorted(alike))} contain {listed}, and are not in class_names"
      raise ValueError(f"{wrong}; expected <class>/<image> or train|val|test/<class>/<image>")


def _check_names_differ(root: pathlib.Path, names: Sequence[str]) -> None:
  first: dict[str, str] = {}
  for name in names:
    if (other := first.setdefault(_spelling(name), name)) != name:
      wrong = f"{root}: class folders {other!r} and {name!r} differ only in case, spaces, _ or -"
      raise ValueError(f"{wrong}; did you mean one class? Rename one, or list both in class_names")


def _spelling(name: str) -> str:
  return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", name.strip()).casefold()


def _scan(root: pathlib.Path) -> list[tuple[str, str]]:
  """Returns (path below the root, class) of every image in a class folder, ordered by hash."""
  found: list[tuple[str, str]] = []
  ignored: list[str] = []
  for folder in _folders(root):
    images, others = list_images(folder)
    name = unicodedata.normalize("NFC", folder.name)  # macOS decomposes accents
    found += [(f"{folder.name}/{path}", name) for path in images]
    ignored += [f"{folder.name}/{path}" for path in others]
    ignored += [] if images else [f"{folder.name} (no images: not a class)"]
  log_ignored(root, ignored)
  return sorted(found, key=lambda file: (hash_name(file[0]), file[0]))


def _labelled(root: pathlib.Path, files: list[tuple[str, str]], names: Sequence[str]) -> Labelled:
  labels = {unicodedata.normalize("NFC", name): label for label, name in enumerate(names)}
  unknown = sorted({name for _, name in files} - set(labels))
  if unknown:
    nearest = {_spelling(name): f"; did you mean {name!r}?" for name in names}
    hint = nearest.get(_spelling(unknown[0]), f"; add all {len(unknown)} missing")
    raise ValueError(f"{root / unknown[0]} is not in class_names{hint}")
  return [(path, labels[name]) for path, name in files]


def _hashed_splits(
  root: pathlib.Path, files: Labelled, names: Sequence[str]
) -> dict[str, Labelled]:
  train, test = hold_out(files, TEST_FRACTION)
  untested = sorted({label for _, label in files} - {label for _, label in test})
  if untested:
    named = ", ".join(names[label] for label in untested[:_LISTED])
    _warn_once(f"{root}: {len(untested)} classes have no test image: {named}; add images to them")
  return {"train": train, "test": test, "all": files}


def hold_out(
  files: Labelled, fraction: float, *, highest: bool = False
) -> tuple[Labelled, Labelled]:
  """Splits files, ordered by hash, in (rest, held out): a fraction of the range of hashes.

  Each class of two or more files has at least one in either part. Those with the lowest hashes are
  held out, or with the highest.
  """
  by_class: dict[int, Labelled] = {}
  for file in reversed(files) if highest else files:
    by_class.setdefault(file[1], []).append(file)
  held: set[tuple[str, int]] = set()
  for members in by_class.values():
    ranks = (hash_name(path) / 2**64 for path, _ in members)
    count = sum((1 - rank if highest else rank) < fraction for rank in ranks)
    held.update(members[: min(max(count, 1), len(members) - 1)])
  if not held:  # one file a class
    held = set(files[-1:] if highest else files[:1])
  return [f for f in files if f not in held], [f for f in files if f in held]


def hash_name(path: str) -> int:
  """Returns a number in [0, 2**64) that depends only on the path."""
  return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")


def _name_choices(splits: FolderSplits) -> base.Splits:
  validation = [name for name in base.VALIDATION_NAMES if name in splits]
  if "train" not in splits:
    return splits
  if "test" in splits and len(validation) == 1:
    return {**splits, "fit": splits["train"], "choose": splits[validation[0]]}
  train = splits["train"]
  parts = {"fit": lambda: train().part(chosen=False), "choose": lambda: train().part(chosen=True)}
  return {**splits, **parts}


def _name_test(splits: base.Splits, location: str) -> base.Splits:
  """Makes `test` an alias of the validation set where there is none, and the reverse.

  TFDS datasets have no such aliases: published scores are of one split.
  """
  validation = {splits[name] for name in base.VALIDATION_NAMES if name in splits}
  if "test" in splits and not validation:
    return {**splits, **dict.fromkeys(base.VALIDATION_NAMES, splits["test"])}
  if "test" in splits or len(validation) > 1:
    return splits
  if validation:
    return {**splits, "test": validation.pop()}
  absent = functools.partial(_nothing_held_out, location)
  return {**splits, **dict.fromkeys(("test", *base.VALIDATION_NAMES), absent)}


def _nothing_held_out(location: str) -> base.Source:
  raise ValueError(
    f"folder:{location} has images in train/, but no class folders in test/ or val/; add one, or "
    f"give folder:{location.rstrip('/')}/train, of which a tenth is then held out"
  )
