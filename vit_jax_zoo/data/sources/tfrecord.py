"""TFRecord files by index, and their conversion to ArrayRecord, without TensorFlow.

A TFRecord file is a sequence of records: uint64 length, uint32 CRC of the length, data, uint32 CRC
of the data, all little-endian (tensorflow/core/lib/io/record_writer.h).
"""

import bisect
import itertools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

_HEADER, _FOOTER = 12, 4


class TFRecordFiles:
  """Records of several files, each indexed at its first access; pickled as names and counts."""

  def __init__(
    self, files: Sequence[str], lengths: Sequence[int], decode: Callable[[bytes], Any]
  ) -> None:
    self._files = list(files)
    self._ends = list(itertools.accumulate(lengths))
    self._decode = decode
    self._opened: dict[int, tuple[int, np.ndarray]] = {}

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_opened": {}}

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Any:
    shard = bisect.bisect_right(self._ends, index)
    first = self._ends[shard - 1] if shard else 0
    file, offsets = self._open(shard, self._ends[shard] - first)
    start, length = offsets[index - first]
    return self._decode(os.pread(file, int(length), int(start)))

  def _open(self, shard: int, expected: int) -> tuple[int, np.ndarray]:
    if shard not in self._opened:
      path = self._files[shard]
      offsets = np.array(list(_index(path)), np.int64).reshape(-1, 2)
      if len(offsets) != expected:
        problem = f"{path} has {len(offsets)} whole records, expected {expected}"
        raise ValueError(f"{problem} by dataset_info.json; copy the file of this version again")
      # Two threads may both open the file; setdefault keeps one, the other is closed.
      opened = (os.open(path, os.O_RDONLY), offsets)
      if self._opened.setdefault(shard, opened) is not opened:
        os.close(opened[0])
    return self._opened[shard]

  def __del__(self) -> None:
    for file, _ in self.__dict__.get("_opened", {}).values():
      os.close(file)


def read_records(path: str) -> Iterator[bytes]:
  """Yields the records of a file in order; ValueError if it ends in the middle of one."""
  end = 0
  with open(path, "rb") as file:
    for start, length in _index(path):
      file.seek(start)
      yield file.read(length)
      end = start + length + _FOOTER
  if end != os.path.getsize(path):
    raise ValueError(f"{path} ends in the middle of a record, at byte {os.path.getsize(path)}")


def _index(path: str) -> Iterator[tuple[int, int]]:
  """Yields (offset, length) of the data of every whole record."""
  size = os.path.getsize(path)
  position = 0
  with open(path, "rb") as file:
    while position + _HEADER + _FOOTER <= size:
      file.seek(position)
      (length,) = struct.unpack("<Q", file.read(8))
      if position + _HEADER + length + _FOOTER > size:
        return
      yield position + _HEADER, length
      position += _HEADER + length + _FOOTER
