"""Reads TensorFlow checkpoints without TensorFlow: `model.ckpt-<step>.{index,data-...}`.

A checkpoint is a table of names, `.index`, and raw numbers in one or more `.data-00000-of-00032`
files. The table is LevelDB's (github.com/google/leveldb, doc/table_format.md): blocks of sorted
keys, each sharing a prefix with the one before, found through a footer at the end of the file. Its
values are `BundleEntryProto`s (tensorflow/core/protobuf/tensor_bundle.proto): type, shape, shard,
offset, size.
"""

import math
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from vit_jax_zoo.weights.key_map import Flat, WeightsError

_MAGIC, _FOOTER = 0xDB4775248B80FB57, 48
_HEADER = b""  # key of the table's first entry, the `BundleHeaderProto`

# tensorflow/core/framework/types.proto
_TYPES = {
  1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8, 9: np.int64,
  10: np.bool_, 14: ml_dtypes.bfloat16, 19: np.float16, 22: np.uint32, 23: np.uint64,
}  # fmt: skip


def find_prefix(path: str) -> str | None:
  """Returns a checkpoint's prefix, given it, an `.index` file or a folder (last step), or None."""
  location = epath.Path(path)
  if location.exists() and location.is_dir():
    files = [file for file in location.iterdir() if file.suffix == ".index" and file.is_file()]
    return max((str(file).removesuffix(".index") for file in files), key=_step, default=None)
  prefix = path.removesuffix(".index")
  index = epath.Path(f"{prefix}.index")
  return prefix if index.exists() and not pathlib.Path(index).is_fifo() else None


def _step(prefix: str) -> int:
  match = re.search(r"-(\d+)$", prefix)
  return int(match[1]) if match else -1


def read_bundle(prefix: str) -> Flat:
  """Returns all arrays of a checkpoint by variable name; 16-bit floats are widened to float32."""
  try:
    entries = dict(_read_table(epath.Path(f"{prefix}.index").read_bytes()))
    header = _parse(entries.pop(_HEADER))
    shards = int(header.get(1, [1])[0])
    fields = {name.decode(): _parse(value) for name, value in entries.items()}
    return _read_tensors(prefix, fields, shards)
  except WeightsError:
    raise
  except (OSError, KeyError, IndexError, ValueError, struct.error) as error:
    raise WeightsError(
      f"{prefix}.index is no TensorFlow checkpoint that can be read, or a truncated one ({error})"
    ) from None


def _read_tensors(prefix: str, fields: Mapping[str, Mapping[int, Any]], shards: int) -> Flat:
  arrays: Flat = {}
  problems = []
  for shard in range(shards):
    here = {name: entry for name, entry in fields.items() if entry.get(3, [0])[0] == shard}
    file = epath.Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}")
    if here and not file.exists():
      problems.append(f"{file.name} is missing")
      continue
    data = file.read_bytes() if here else b""
    for name, entry in here.items():
      offset, size = entry.get(4, [0])[0], entry.get(5, [0])[0]
      if offset + size > len(data):
        problems.append(f"{file.name} ends before {name}")
      else:
        arrays[name] = _tensor(name, entry, data[offset : offset + size])
  if problems:
    raise WeightsError(f"{prefix}: {'; '.join(problems)}; expected a complete checkpoint")
  return {name: arrays[name] for name in fields}


def _tensor(name: str, entry: Mapping[int, Any], data: bytes) -> np.ndarray:
  kind = entry.get(1, [0])[0]
  if kind not in _TYPES or 7 in entry:
    raise WeightsError(f"{name}: type {kind}, or in slices; expected a whole array of numbers")
  dims = [_parse(dim).get(1, [0])[0] for dim in _parse(entry.get(2, [b""])[0]).get(2, [])]
  dtype = np.dtype(_TYPES[kind])
  if math.prod(dims) * dtype.itemsize != len(data):
    raise ValueError(f"{name}: {len(data)} bytes; expected shape {tuple(dims)}")
  array = np.frombuffer(data, dtype).reshape(dims)
  return array.astype(np.float32) if dtype.itemsize == 2 and dtype.kind in "fV" else array


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
    raise ValueError("it does not end as such a file does")
  (_, _, *index), _ = _varints(data, len(data) - _FOOTER, 4)  # statistics blocks are skipped
  for _, value in _read_block(data, *index):
    yield from _read_block(data, *_varints(value, 0, 2)[0])


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
  if data[offset + size] != 0:
    raise ValueError("its table is compressed, which TensorFlow's are not")
  block = data[offset : offset + size]
  restarts = struct.unpack("<I", block[-4:])[0]
  position, end, key = 0, size - 4 - 4 * restarts, b""
  while position < end:
    (shared, own, length), position = _varints(block, position, 3)
    key = key[:shared] + block[position : position + own]
    position += own
    yield key, block[position : position + length]
    position += length


def _varints(data: bytes, position: int, count: int) -> tuple[list[int], int]:
  values = [0] * count
  for i in range(count):
    shift, byte = 0, 0x80
    while byte & 0x80:
      byte = data[position]
      values[i] |= (byte & 0x7F) << shift
      position, shift = position + 1, shift + 7
  return values, position


def _parse(message: bytes) -> dict[int, list[Any]]:
  fields: dict[int, list[Any]] = {}
  position = 0
  while position < len(message):
    (tag,), position = _varints(message, position, 1)
    number, kind = tag >> 3, tag & 7
    if kind not in (0, 1, 2, 5):
      raise ValueError(f"its table has a field of the unknown kind {kind}")
    size = 8 if kind == 1 else 4
    if kind in (0, 2):
      (size,), position = _varints(message, position, 1)
    value = size if kind == 0 else message[position : position + size]
    position += 0 if kind == 0 else size
    fields.setdefault(number, []).append(value)
  return fields
