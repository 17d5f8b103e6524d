"""Image files below a folder."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from vit_jax_zoo.data.images import suffixes
from vit_jax_zoo.data.sources.base import DatasetInfo, Source

_LISTED = 5  # ignored files that are named in the log


class FileSource(Source):
  """Examples of `files`: an image's path below a folder, and the rest of the example."""

  def __init__(
    self, info: DatasetInfo, root: str | os.PathLike, files: Sequence[tuple[str, Any]]
  ) -> None:
    self.info = dataclasses.replace(info, num_examples=len(files))
    self._root, self._files = os.fspath(root), files

  def example_name(self, index: int) -> str:
    """Returns the path of the image file."""
    return os.path.join(self._root, self._files[index][0])

  def read(self, file: str) -> bytes:
    """Returns the content of a file, given by its path below the folder."""
    with open(os.path.join(self._root, file), "rb") as stream:
      return stream.read()


def list_images(
  folder: str | os.PathLike, *, recursive: bool = True
) -> tuple[list[str], list[str]]:
  """Returns the image files below a folder, following links, and the ignored ones.

  Paths are those below the folder, with "/", sorted. Images are regular files with one of
  `images.suffixes()`; ignored dangling links and special files have the reason. Hidden files and
  folders (`.ipynb_checkpoints`, `._a.jpg`) and `__MACOSX` are skipped.
  """
  images, ignored = [], []
  for path, reason in _walk(os.fspath(folder), "", (), recursive=recursive):
    is_image = not reason and os.path.splitext(path)[1].lower() in suffixes()
    (images if is_image else ignored).append(path + reason)
  return sorted(images), sorted(ignored)


def _walk(
  folder: str, below: str, parents: tuple[str, ...], *, recursive: bool
) -> Iterator[tuple[str, str]]:
  """Yields the path of each file and why it cannot be read, or an empty text."""
  real = os.path.realpath(folder)
  if real in parents:  # a link to a folder above it
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      path = f"{below}{entry.name}"
      if is_hidden(entry.name) or (entry.is_dir() and not recursive):
        continue
      if entry.is_dir():
        yield from _walk(entry.path, f"{path}/", (*parents, real), recursive=True)
      elif entry.is_file():
        yield path, ""
      else:
        yield path, " (dangling link)" if entry.is_symlink() else " (not a regular file)"


def is_hidden(name: str) -> bool:
  """Returns whether a file or folder of this name is none of the user's data."""
  return name.startswith(".") or name == "__MACOSX"


def log_ignored(folder: str | os.PathLike, ignored: Sequence[str]) -> None:
  """Logs the files of a folder that are not images, once for each folder."""
  if ignored:
    named = ", ".join(ignored[:_LISTED]) + (", ..." if len(ignored) > _LISTED else "")
    _log_once(f"{folder}: ignored {len(ignored)} files that are not images: {named}")


_log_once = functools.cache(logging.info)  # each split of a run lists the folder again


def read_class_names(class_names: Sequence[str] | str | None) -> tuple[str, ...]:
  """Returns class names: those given, or those in a text file of one a line or a JSON list."""
  if not isinstance(class_names, str):
    return tuple(class_names or ())
  text = pathlib.Path(class_names).expanduser().read_text(encoding="utf-8-sig")
  if text.lstrip().startswith("["):
    return tuple(map(str, json.loads(text)))
  return tuple(line.strip() for line in text.splitlines() if line.strip())
