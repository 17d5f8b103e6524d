"""Image files below a folder."""

import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from vit_jax_zoo.data.images import suffixes

_LISTED = 5
"""Ignored files that are named in the log."""


class Listing(NamedTuple):
  """Content of a folder; paths below it, with "/", sorted.

  Attributes:
    images: regular files with one of `images.suffixes()`.
    ignored: all others but hidden ones; dangling links and special files with the reason.
  """

  images: list[str]
  ignored: list[str]


def list_images(folder: str | os.PathLike, *, recursive: bool = True) -> Listing:
  """Lists the image files below a folder, following links.

  Hidden files and folders (`.ipynb_checkpoints`, `._a.jpg`) and `__MACOSX` are skipped.
  """
  found = Listing([], [])
  _list(os.fspath(folder), "", found, recursive=recursive, parents=())
  return Listing(sorted(found.images), sorted(found.ignored))


def _list(
  folder: str, below: str, found: Listing, *, recursive: bool, parents: tuple[str, ...]
) -> None:
  real = os.path.realpath(folder)
  if real in parents:  # a link to a folder above it
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      path = f"{below}{entry.name}"
      if is_hidden(entry.name):
        continue
      if entry.is_dir():
        if recursive:
          _list(entry.path, f"{path}/", found, recursive=True, parents=(*parents, real))
      elif not entry.is_file():
        reason = "dangling link" if entry.is_symlink() else "not a regular file"
        found.ignored.append(f"{path} ({reason})")
      elif os.path.splitext(entry.name)[1].lower() in suffixes():
        found.images.append(path)
      else:
        found.ignored.append(path)


def is_hidden(name: str) -> bool:
  """Returns whether a file or folder of this name is none of the user's data."""
  return name.startswith(".") or name == "__MACOSX"


def log_ignored(folder: str | os.PathLike, ignored: Sequence[str]) -> None:
  """Logs the files of a folder that are not images, once for each folder."""
  if ignored:
    _log_ignored(os.fspath(folder), tuple(ignored))


@functools.cache  # each split of a run lists the folder again
def _log_ignored(folder: str, ignored: tuple[str, ...]) -> None:
  named = ", ".join(ignored[:_LISTED]) + (", ..." if len(ignored) > _LISTED else "")
  logging.info("%s: ignored %d files that are not images: %s", folder, len(ignored), named)


def read_class_names(class_names: Sequence[str] | str | None) -> tuple[str, ...]:
  """Returns class names: those given, or those in a text file of one a line or a JSON list."""
  if not isinstance(class_names, str):
    return tuple(class_names or ())
  text = pathlib.Path(class_names).expanduser().read_text(encoding="utf-8-sig")
  if text.lstrip().startswith("["):
    return tuple(map(str, json.loads(text)))
  return tuple(line.strip() for line in text.splitlines() if line.strip())
