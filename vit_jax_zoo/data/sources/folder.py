"""Image classification from your own images: a folder for each class.

docs/guides/classification.md shows the layouts, docs/guides/data.md the names of splits. Parts are
held out by a hash of each file's path below the root: the same on every machine, and stable when
files are added. Examples are in the order of the hash, so that any slice mixes the classes. Class
names are normalised (NFC).
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging

from vit_jax_zoo.data.images import read_file, suffixes
from vit_jax_zoo.data.sources import base
from vit_jax_zoo.errors import name_of

SPLIT_FOLDERS = {
  "train": "train", "training": "train", "test": "test", "testing": "test", "dev": "val",
  "eval": "val", **{name: name for name in base.VALIDATION_NAMES},
}  # fmt: skip

TEST_FRACTION = 0.1
CHOOSE_FRACTION = 0.1

Labelled: TypeAlias = list[tuple[Any, ...]]
"""Path or name of an example, class or a tuple of classes, and what else its source needs."""

_LISTED = 5  # maximum number of files or classes in a message
_SYSTEM_FOLDERS = (
  "__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information",
)  # fmt: skip

_LABEL_MAPS = ("mask", "masks", "label", "labels", "annotation", "annotations", "segmentations")
_CONTAINERS = ("data", "dataset", "datasets", "images", "imgs", "photos", "pictures")

_warn_once = functools.cache(logging.warning)
_log_once = functools.cache(logging.info)  # each split of a run lists the folder again


class FileSource(base.Source):
  """Examples of `files`: an image's path below a folder, and the rest of the example."""

  def __init__(self, info: base.DatasetInfo, root: str | os.PathLike, files: list[Any]) -> None:
    self.info = dataclasses.replace(info, num_examples=len(files))
    self._root, self._files = os.fspath(root), files

  def example_name(self, index: int) -> str:
    return base.file_path(self._root, self._files[index][0])

  def read(self, file: str) -> bytes:
    return read_file(base.file_path(self._root, file))


def list_images(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
  """Returns the sorted paths of the images below a folder, following links, and the ignored ones.

  Images are regular files with one of `images.suffixes()`; ignored dangling links and special files
  have the reason. Skipped are hidden entries, `_SYSTEM_FOLDERS`, links to folders above and, with a
  warning, unreadable entries.
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


ClassNames: TypeAlias = Sequence[str] | str | None  # in the order of their ids, or a text file


def read_class_names(class_names: ClassNames) -> tuple[str, ...]:
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


class LabelledSource(FileSource):
  """Images with a class, a tuple of classes, or None. `image` is the file's bytes."""

  def __getitem__(self, index: int) -> base.Example:
    label = self._files[index][1]
    label = np.array(label, np.int32) if isinstance(label, tuple) else label
    return {**self._load(index), **({} if label is None else {"label": label})}

  def _load(self, index: int) -> base.Example:  # without its label
    return {"image": self.read(self._files[index][0])}

  def labels(self) -> np.ndarray | None:
    labels = [file[1] for file in self._files]
    return np.array(labels, np.int64) if isinstance(labels[0], int) else None

  def split_by_hash(self) -> dict[str, Callable[[], "LabelledSource"]]:
    """Returns the splits of a source without a test set: `train`, `test` and `all`."""
    train, test = hold_out(self._files, TEST_FRACTION)
    untested = sorted({file[1] for file in train} - {file[1] for file in test})
    if untested and isinstance(untested[0], int):
      named = ", ".join(name_of(label, self.info.class_names) for label in untested[:_LISTED])
      text = f"{len(untested)} classes have no test image: {named}; add images to them"
      _warn_once(f"{self._root or self.info.name}: {text}")
    parts = {"train": train, "test": test, "all": self._files}
    return {split: functools.partial(self._take, files) for split, files in parts.items()}

  def part(self, *, chosen: bool) -> "LabelledSource":
    """Returns the held-out part (`chosen`) or the rest; ValueError for fewer than two files."""
    if len(self._files) < 2:
      raise ValueError(f"{self.info.name}: {len(self._files)} training image; add some to hold out")
    return self._take(hold_out(self._files, CHOOSE_FRACTION, highest=True)[chosen])

  def _take(self, files: Labelled) -> "LabelledSource":
    other = copy.copy(self)
    other.info = dataclasses.replace(self.info, num_examples=len(files))
    other._files = files
    return other


LabelledSplits: TypeAlias = Mapping[str, Callable[[], LabelledSource]]


def open_splits(location: str, class_names: ClassNames = None) -> base.Splits:
  """Finds the images below a local folder.

  `class_names` are needed where labels must agree with a published model's. Default: folder names
  in sorted order. FileNotFoundError without the folder; ValueError for a remote one, or one without
  class folders or images, or with a class that `class_names` lacks.
  """
  return complete_splits(find_splits(location, class_names), location)


def find_splits(location: str, class_names: ClassNames = None) -> LabelledSplits:
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
    for split, files in found.items():
      _check_inner_folders(folders[split], files)
    _check_names_differ(dict.fromkeys(every, f"{root}"))
    names = tuple(every)
  whole = base.DatasetInfo(f"folder:{location}", 0, len(names), names)
  splits = {}
  for split, files in found.items():
    ids = number_classes({name: f"{folders[split] / name}" for _, name in files}, names)
    if labelled := [(path, ids[name]) for path, name in files]:
      splits[split] = functools.partial(LabelledSource, whole, folders[split], labelled)
  return splits[""]().split_by_hash() if "" in splits else splits


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the folders of splits, which have class folders inside; none if `train` is a class."""
  folders = _folders(root)
  named = [f for f in folders if split_of(f.name)]
  nested = [f for f in named if _folders(f)]
  splits: dict[str, pathlib.Path] = {}
  for folder in nested:
    split = split_of(folder.name) or ""
    if split in splits:
      raise ValueError(f"{splits[split]} and {folder} are both the split {split!r}; keep one")
    inner = _folders(folder)  # train/train/<class> of Kaggle's archives, train/images/<class>
    is_wrapped = len(inner) == 1 and inner[0].name.lower() in (folder.name.lower(), *_CONTAINERS)
    splits[split] = inner[0] if is_wrapped and _folders(inner[0]) else folder
  others = ", ".join(f.name for f in folders if f not in nested)
  if "train" in splits or (splits and not others):
    if others:
      _warn_once(f"{root}: ignored folders next to the split folders: {others}")
    return splits
  if splits or len({split_of(f.name) for f in named}) > 1:
    expected = f"{named[0].name}/<class>/<image>"
    raise ValueError(f"{root}: {others}: not splits with class folders; expected {expected}")
  return {}


def split_of(name: str) -> str | None:
  """Returns the split that a folder or file is named after, if any."""
  name = re.sub(r"[-_ ]?(set|data|images|(19|20)\d\d)$", "", name.lower())
  return SPLIT_FOLDERS.get(re.sub(r"^(seg|data|dataset|images?)[-_ ]", "", name))


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(f for f in root.iterdir() if f.is_dir() and not _is_hidden(f.name))


def _check_not_wrapped(inner: pathlib.Path, location: str) -> None:
  inside = _folders(inner)
  while len(inside) == 1 and _folders(inside[0]):
    inner, location = inside[0], f"{location.rstrip('/')}/{inner.name}"
    inside = _folders(inner)
  splits = any(split_of(f.name) for f in inside)
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
  stems = {re.sub(r"\d+", "", top) for top in inside}  # "fold" of fold1 and fold2
  are_parts = len(inside) > len(stems) == 1 and re.search(r"[^\W_]", "".join(stems))
  are_parts = are_parts and all("" not in names for names in inside.values())
  maps = sorted(top for top in inside if top.lower() in _LABEL_MAPS)
  if maps and {top.lower() for top in inside} & {*_CONTAINERS}:
    wrong = f"{root}: {maps[0]}/ beside images/ is no class; expected <class>/<image>"
    raise ValueError(f"{wrong}. Set segmentation:{root} for label maps, or list it in class_names")
  first: dict[str, str] = {}  # folders by the folders inside
  for top, names in sorted(inside.items()):
    listed = ", ".join((folders := sorted(names - {""}))[:_LISTED])
    if len(inside) > 1 and len(folders) > 1 and top.lower() in _CONTAINERS:
      wrong = f"{root}: {top}/ has the folders {listed}"
      raise ValueError(f"{wrong}; did you mean folder:{root / top}?")
    alike = {top} if len(set(map(split_of, folders)) - {None}) > 1 else set()
    alike |= set(inside) if are_parts and len(folders) > 1 else set()
    for other in {first.setdefault(name, top) for name in folders} - {top}:
      several = len(names | inside[other]) > 1 and "" not in names | inside[other]
      alike |= {other, top} if several or len((names & inside[other]) - {""}) > 1 else set()
    if alike:
      wrong = f"{root}: {', '.join(sorted(alike))} contain {listed}, and are not in class_names"
      raise ValueError(f"{wrong}; expected <class>/<image> or train|val|test/<class>/<image>")


def _check_names_differ(found: Mapping[str, str]) -> None:
  """Refuses names that differ in spelling; the values of `found` are what an error names."""
  first: dict[str, str] = {}
  for name in sorted(found):
    if (other := first.setdefault(_spelling(name), name)) != name:
      wrong = f"{found[name]}: classes {other!r} and {name!r} differ only in case, spaces, _ or -"
      raise ValueError(f"{wrong}; did you mean one class? Rename one, or list both in class_names")


def _spelling(name: str) -> str:
  return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", name.strip()).casefold()


def _scan(root: pathlib.Path) -> list[tuple[str, str]]:
  """Returns (path below the root, class) of every image in a class folder, ordered by hash."""
  found: list[tuple[str, str]] = []
  ignored: list[str] = []
  for folder in _folders(root):
    images, others = list_images(folder)
    found += [(f"{folder.name}/{path}", base.composed(folder.name)) for path in images]
    ignored += [f"{folder.name}/{path}" for path in others]
    ignored += [] if images else [f"{folder.name} (no images: not a class)"]
  log_ignored(root, ignored)
  return sorted(found, key=by_hash)


def number_classes(found: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
  """Returns the id of each class in `found`, whose values are what an error names."""
  ids = {base.composed(name): number for number, name in enumerate(names)}
  unknown = sorted(found.keys() - ids)
  if unknown:
    nearest = {_spelling(name): f"; did you mean {name!r}?" for name in names}
    hint = nearest.get(_spelling(unknown[0]), f"; add all {len(unknown)} missing")
    raise ValueError(f"{found[unknown[0]]} is not in class_names{hint}")
  return ids


def encode_labels(
  splits: Mapping[str, Labelled],
  class_names: ClassNames,
  name_of_label: Callable[[Any], str],  # from a file, in errors
) -> tuple[dict[str, Labelled], int, tuple[str, ...]]:
  """Replaces the labels of files by class ids; returns the number of classes and their names.

  Integers are ids; texts are names, in sorted order unless `class_names` is given.
  """
  first: dict[Any, str] = {}
  for file in itertools.chain.from_iterable(splits.values()):
    for value in file[1] if isinstance(file[1], tuple) else file[1:2]:
      if not isinstance(value, int | str):
        raise ValueError(f"{name_of_label(file)} {value!r}; expected an integer or a text")
      if value not in first:
        first[value] = f"{name_of_label(file)} {value!r}"
  names = read_class_names(class_names)
  if all(isinstance(value, int) for value in first):
    most = max(100_000, 10 * len(first))  # a model has an output for each id
    count = len(names) or min(max(first, default=0) + 1, most)
    for value in (value for value in first if not 0 <= value < count):
      raise ValueError(f"{first[value]}: no class; expected 0 to {count - 1}. Check class_names")
    ids = {value: value for value in first}
  else:
    texts = {value: base.composed(str(value)) for value in first}
    found = {texts[value]: where for value, where in first.items()}
    if not names:
      _check_names_differ(found)
    names = names or tuple(sorted(found))
    count, numbers = len(names), number_classes(found, names)
    ids = {value: numbers[text] for value, text in texts.items()}

  def encode(label: Any) -> Any:
    return tuple(ids[value] for value in label) if isinstance(label, tuple) else ids[label]

  encoded = {s: [(f[0], encode(f[1]), *f[2:]) for f in files] for s, files in splits.items()}
  return encoded, count, names


def hold_out(
  files: Labelled, fraction: float, *, highest: bool = False
) -> tuple[Labelled, Labelled]:
  """Splits files in (rest, held out), both in their order: a fraction of the range of hashes.

  Each class of two or more files has at least one in either part. Those with the lowest hashes are
  held out, or with the highest.
  """
  ranks = [hash_name(file[0]) / 2**64 for file in files]
  order = sorted(range(len(files)), key=lambda i: by_hash(files[i]), reverse=highest)
  by_class: dict[Any, list[int]] = {}
  for i in order:
    by_class.setdefault(files[i][1], []).append(i)
  held: set[int] = set()
  for members in by_class.values():
    count = sum((1 - ranks[i] if highest else ranks[i]) < fraction for i in members)
    held.update(members[: min(max(count, 1), len(members) - 1)])
  held = held or set(order[:1])  # one file a class
  kept = [file for i, file in enumerate(files) if i not in held]
  return kept, [files[i] for i in sorted(held)]


def by_hash(file: tuple[Any, ...]) -> tuple[int, str]:
  """Returns the key that sorts files by the hash of their paths."""
  return hash_name(file[0]), file[0]


def hash_name(path: str) -> int:
  """Returns a number in [0, 2**64) that depends only on the path."""
  return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")


def complete_splits(splits: LabelledSplits, location: str) -> base.Splits:
  """Adds `fit` and `choose`; one of validation and test set gets the names of both.

  TFDS datasets have no such aliases: published scores are of one split.
  """

  def nothing_held_out() -> base.Source:
    raise ValueError(
      f"folder:{location} has images in train/, but no class folders in test/ or val/; add one, or "
      f"give folder:{location.rstrip('/')}/train, of which a tenth is then held out"
    )

  found = dict[str, Callable[[], base.Source]](splits)
  validation = [splits[name] for name in base.VALIDATION_NAMES if name in splits]
  if train := splits.get("train"):
    if "test" in splits and len(validation) == 1:
      found |= {"fit": train, "choose": validation[0]}
    else:
      found["fit"] = lambda: train().part(chosen=False)
      found["choose"] = lambda: train().part(chosen=True)
  if len(validation) > 1 or not (train or validation or "test" in splits):
    return found
  held_out = validation[0] if validation else splits.get("test", nothing_held_out)
  return {"test": held_out, **found, **dict.fromkeys(base.VALIDATION_NAMES, held_out)}


def hold_out_test(splits: LabelledSplits) -> base.Splits:
  """Returns all splits; without a test or validation set, a part of `train` is held out."""
  if "train" in splits and not splits.keys() & {"test", *base.VALIDATION_NAMES}:
    splits = {**splits, **splits["train"]().split_by_hash()}
  return complete_splits(splits, "")
