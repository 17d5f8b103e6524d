"""Image classification from tables of image files and labels: docs/guides/data.md."""

import csv
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vit_jax_zoo.data.sources import base, folder


class CsvSource(folder.LabelledSource):
  """Image files of a table: path, class or classes, and the row in messages."""

  def example_name(self, index: int) -> str:
    return f"{super().example_name(index)} ({self._files[index][2]})"

  def missing(self) -> list[int]:
    return base.missing_files([[base.file_path(self._root, file[0])] for file in self._files])


class _Row(NamedTuple):
  path: str
  labels: tuple[str, ...]
  where: str  # in messages
  split: str


def open_splits(
  location: str,
  image_key: str = "path",  # name of the column of files
  label_key: str = "label",  # name of the column of classes
  class_names: folder.ClassNames = None,
) -> base.Splits:
  """Reads tables: FileNotFoundError without, ValueError, with file and row, for a wrong one."""
  path = pathlib.Path(location).expanduser()
  tables = {path: "train"}
  if path.is_dir():
    files = sorted(path.glob("*.[ct]sv"))
    tables = {file: split for file in files if (split := folder.split_of(file.stem))}
  if not tables or not all(map(os.path.isfile, tables)):
    raise FileNotFoundError(f"csv:{location}: no table; expected a file, or a folder of train.csv")
  read = [_read(file, split, (image_key, label_key)) for file, split in tables.items()]
  columns = list(dict.fromkeys(name for classes, _ in read for name in classes))
  rows = sorted((row for _, rows in read for row in rows), key=folder.by_hash)
  if not rows:
    raise ValueError(f"csv:{location}: no rows below the header; expected one for each image")
  several = bool(columns) or any(len(row.labels) > 1 for row in rows)
  every = (label.removeprefix("-") for row in rows for label in row.labels)
  are_ids = not columns and all(map(str.isdecimal, every))
  found: dict[str, folder.Labelled] = {}
  first: dict[tuple[str, str], _Row] = {}
  for row in rows:
    if (other := first.setdefault((row.split, row.path), row)) is not row:
      wrong = f"path: {row.path} is also in {other.where}"
      raise ValueError(f"{row.where}: {wrong}; expected one row, with labels separated by |")
    if not (several or row.labels):
      raise ValueError(f"{row.where}: label: empty; expected a class")
    labels = tuple(map(int, row.labels)) if are_ids else row.labels
    found.setdefault(row.split, []).append((row.path, labels if several else labels[0], row.where))
  names, label_name = class_names or columns, "{0[2]}: label:".format
  found, count, class_names = folder.encode_labels(found, names, label_name)
  info = base.DatasetInfo(f"csv:{location}", 0, count, class_names)
  root = path if path.is_dir() else path.parent
  splits = {s: functools.partial(CsvSource, info, root, rows) for s, rows in found.items()}
  return folder.hold_out_test(splits)


def _read(file: pathlib.Path, split: str, keys: tuple[str, str]) -> tuple[list[str], list[_Row]]:
  """Returns the columns of classes, and the rows, of a table; `split` is that of all rows."""
  try:
    with open(file, encoding="utf-8-sig", newline="") as stream:
      header = stream.readline()
      stream.seek(0)
      delimiter = max(",;\t", key=header.count)
      reader = csv.DictReader(stream, delimiter=delimiter, strict=True, skipinitialspace=True)
      columns = [column.strip() for column in reader.fieldnames or ()]
      image_key, label_key = keys
      renamed = {"path": "", "label": "", image_key: "path", label_key: "label"}
      names = reader.fieldnames = [renamed.get(column, column) for column in columns]
      lines = [(reader.line_num, fields) for fields in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{file}: not a table in UTF-8 ({error})") from None
  several = label_key == "label" not in columns
  classes = [c for c in names if c not in ("", "path", "split")] if several else []
  if "path" not in names or not (classes or "label" in names):
    expected = f"{image_key},{label_key} (set image_key, label_key), or 0 and 1 for each class"
    raise ValueError(f"{file}: the header is {','.join(columns)}; expected {expected}")
  return classes, [_row(fields, classes, f"{file}, row {n}", split) for n, fields in lines]


def _row(fields: Mapping[str, str], classes: Sequence[str], where: str, split: str) -> _Row:
  if None in fields or None in fields.values():
    raise ValueError(f"{where}: not as many fields as the header; quote fields with a delimiter")
  if not fields["path"]:
    raise ValueError(f"{where}: path: empty; expected an image file")
  for name in classes:
    if fields[name] not in ("0", "1"):
      raise ValueError(f"{where}: {name}: {fields[name]!r}; expected 0 or 1")
  labels = [name for name in classes if fields[name] == "1"]
  labels += [label.strip() for label in fields.get("label", "").split("|") if label.strip()]
  split = fields.get("split") or split
  path = os.path.normpath(fields["path"])  # "./a.jpg" is "a.jpg"
  return _Row(path, tuple(labels), where, folder.split_of(split) or split)
