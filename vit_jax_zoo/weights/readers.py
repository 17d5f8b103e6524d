"""Reads arrays from published files, detected by their content; writes .safetensors and .pth.

weights.npz                           numpy archive
model.safetensors                     safetensors
model.pth, pytorch_model.bin          PyTorch pickle; this is the only module that imports PyTorch
R-50.pkl                              pickle of numpy arrays
folder/                               one of these, whole or sharded, with JSON files beside it
model.ckpt-1000000[.index]            TensorFlow checkpoint, read without TensorFlow

Pickles may contain code, which is never executed: only arrays and plain containers are built.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import pickle
import re
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from os.path import commonprefix
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vit_jax_zoo.weights.key_map import Flat, WeightsError

_WRAPPERS = ("blobs", "model", "state_dict")
"""Keys of the arrays within training checkpoints."""
_MAX_RATIO, _MAX_SMALL = 20, 2**30
"""Limits of a .npz's uncompressed bytes: as a multiple of the file's, and of small files."""
_PREFIXES = ("_orig_mod.", "module.", "model.")
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_NAMES = ("ndarray", "dtype", "_reconstruct")


class _Reader(pickle.Unpickler):
  """Unpickles arrays, numbers, strings and containers only."""

  def find_class(self, module_name: str, global_name: str) -> Any:
    """Returns one of the numpy functions that build an array; anything else is refused."""
    if module_name in _MODULES and global_name in _NAMES:
      return getattr(np if module_name == "numpy" else np._core.multiarray, global_name)
    if (module_name, global_name) == ("_codecs", "encode"):  # bytes in protocol 2
      return str.encode
    raise WeightsError(f"{module_name}.{global_name}")


def read_pickle(path: str) -> Flat:
  """Returns the arrays of a pickle by name; other objects are ignored."""
  try:
    with epath.Path(path).open("rb") as stream:
      found = _Reader(stream, encoding="latin1").load()
  except WeightsError as error:
    wrong = f"{path}: a pickle with code ({error}), which was not executed"
    raise WeightsError(f"{wrong}; expected arrays only") from None
  except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
    raise WeightsError(f"{path}: truncated ({error}); expected a pickle") from None
  found = found if isinstance(found, Mapping) else {}
  for candidate in (found, *(found.get(key) for key in _WRAPPERS)):
    items = candidate.items() if isinstance(candidate, Mapping) else ()
    if arrays := {str(k): v for k, v in items if isinstance(v, np.ndarray)}:
      return arrays
  raise WeightsError(f"{path} is a pickle without arrays by name")


FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weight files of Hugging Face folders by preference; sharded ones have a `<file>.index.json`."""


@dataclasses.dataclass(frozen=True)
class Published:
  """The content of a checkpoint file or folder, of any format."""

  path: str  # as the user gave it, for error messages
  file: epath.Path  # with the arrays
  arrays: Flat  # by key
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `config.json`
  processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # preprocessor_config


def read_published(path: str) -> Published:
  """Reads the arrays of a file or folder, and the JSON files beside them."""
  file, arrays = _read(epath.Path(path), path)
  # Prefixes of torch.compile, parallel training and Lightning; keys are no paths.
  while prefix := next((p for p in _PREFIXES if commonprefix(list(arrays)).startswith(p)), None):  # noqa: RUF071
    arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}
  empty = next((key for key, array in arrays.items() if array.size == 0), None)
  if empty is not None:
    raise WeightsError(f"{path}: {empty} is {arrays[empty].shape}; expected a non-empty array")
  names = ("config.json", "preprocessor_config.json")
  return Published(path, file, arrays, *(read_json(file.with_name(name)) for name in names))


def read_json(file: epath.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; an empty one if the file does not exist."""
  if not file.exists() or pathlib.Path(file).is_fifo():
    return {}
  try:
    # With a byte order mark or without; NaN and Infinity are not JSON: int refuses them.
    found = json.loads(file.read_bytes(), parse_constant=int)
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{file}: {error}; expected JSON") from None
  if not isinstance(found, dict):
    raise WeightsError(f"{file}: a JSON {type(found).__name__}; expected an object")
  return found


def _read(location: epath.Path, path: str) -> tuple[epath.Path, Flat]:
  is_folder = location.exists() and location.is_dir()
  for name in FOLDER_FILES if is_folder else ():
    file, index = location / name, location / f"{name}.index.json"
    if file.exists():
      return file, _read_file(file, str(file))
    if index.exists():
      return file, _read_shards(index)
  if prefix := find_prefix(str(location)):
    return epath.Path(prefix), read_bundle(prefix)
  if is_folder:
    expected = f"{' or '.join(FOLDER_FILES)}, or a TensorFlow checkpoint"
    raise WeightsError(
      f"{path}: no weights; expected {expected}. Give a file of another name itself"
    )
  if not location.exists():
    raise WeightsError(f"{path}: no such file; expected a checkpoint")
  return location, _read_file(location, path)


def _read_shards(index: epath.Path) -> Flat:
  files = read_json(index).get("weight_map")
  names = sorted({str(x) for x in files.values()}) if isinstance(files, dict) else []
  missing = [name for name in names if not (index.parent / name).exists()]
  if missing or not names:
    raise WeightsError(f"{index}: weight_map: missing {', '.join(missing) or 'names of files'}")
  arrays: Flat = {}
  for name in names:
    arrays |= _read_file(index.parent / name, str(index.parent / name))
  return arrays


def _read_file(file: epath.Path, path: str) -> Flat:
  """Reads a file in the format that its content shows; file names are not reliable."""
  if pathlib.Path(file).is_fifo():  # it would block
    raise WeightsError(f"{path}: a named pipe; expected a checkpoint")
  try:
    with file.open("rb") as stream:
      start = stream.read(16)
  except OSError as error:
    raise WeightsError(f"{path}: {error}; expected a readable file") from None
  if start[:2] == b"PK":
    return _read_zip(file, path)
  if start[8:9] == b"{" or file.suffix == ".safetensors":
    return read_safetensors(path)
  if start[:1] == b"\x80":
    return read_pickle(path) if file.suffix == ".pkl" else read_torch(path)
  if start.lstrip()[:1] == b"<":
    raise WeightsError(f"{path}: a web page; expected weights. Download the file itself")
  if file.suffix == ".npz":
    raise WeightsError(f"{path}: truncated, or something else; expected a .npz file")
  if file.suffix in (".pth", ".pt", ".bin") and start:
    return read_torch(path)
  known = ".npz, .safetensors, .pth, a TensorFlow checkpoint, or Hugging Face's folder"
  raise WeightsError(f"{path}: unknown format; expected {known}")


def _read_zip(file: epath.Path, path: str) -> Flat:
  damages = OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError
  try:
    with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
      size, members = file.stat().length, archive.infolist()
      if any(member.filename.endswith("data.pkl") for member in members):
        return read_torch(path)
      claimed = sum(member.file_size for member in members)
      if claimed > max(_MAX_RATIO * size, _MAX_SMALL):
        raise zipfile.BadZipFile(f"its members claim {claimed} bytes, the file has {size}")
      return {member.filename.removesuffix(".npy"): _member(archive, member) for member in members}
  except damages as error:
    if file.suffix != ".npz":
      return read_torch(path)
    raise WeightsError(f"{path} cannot be read as .npz: {error}") from None
  except WeightsError:
    raise
  except ValueError as error:  # object arrays, which numpy would unpickle
    wrong = f"{path}: objects, whose code was not executed ({error})"
    raise WeightsError(f"{wrong}; expected arrays of numbers") from None


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  with archive.open(member) as stream:
    array = read_npy(stream, member.file_size, member.filename)
  # numpy stores bfloat16 as untyped pairs of bytes.
  return array.view(ml_dtypes.bfloat16).astype(np.float32) if array.dtype == "V2" else array


def read_npy(stream: Any, size: int, name: str) -> np.ndarray:
  """Reads an array in numpy's format from a seekable file of `size` bytes.

  EOFError, before allocating, if the header claims more; ValueError for no array of numbers.
  """
  is_first = np.lib.format.read_magic(stream) == (1, 0)
  read_header = getattr(np.lib.format, f"read_array_header_{1 if is_first else 2}_0")
  shape, _, dtype = read_header(stream)
  claimed, found = math.prod(shape) * dtype.itemsize, size - stream.tell()
  if claimed > found and not dtype.hasobject:
    raise EOFError(f"{name} claims {claimed} bytes, shape {shape}; it has {found}")
  stream.seek(0)
  return np.lib.format.read_array(stream, allow_pickle=False)


_EMA_WRAPPERS = ("state_dict_ema", "model_ema")
_TORCH_WRAPPERS = (*_EMA_WRAPPERS, "model", "state_dict", "model_state_dict", "net", "params")
"""Keys of the state dict in training checkpoints, in timm's order of preference."""


def read_torch(path: str) -> Flat:
  """Returns the state dict of a PyTorch file, as timm: the moving average if there is one."""
  torch = _import_torch(path, "convert the file to safetensors")
  with local_copy(path) as file:
    found = _load_torch(torch, file, path)
  half, arrays = (torch.float16, torch.bfloat16), {}
  for key, tensor in _state_dict(torch, found, path).items():
    try:
      arrays[key] = (tensor.float() if tensor.dtype in half else tensor).detach().numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, 8 bits, without data
      raise WeightsError(f"{path}: {key} is not a dense array of numbers ({error})") from None
  return arrays


def _import_torch(path: str, otherwise: str) -> Any:
  try:
    import torch  # pyrefly: ignore[missing-import]
  except ImportError:
    raise ImportError(
      f"{path} is a PyTorch file, and PyTorch is not installed; pip install -e '.[torch]' "
      f"(the CPU version suffices), or {otherwise}"
    ) from None
  return torch


def _load_torch(torch: Any, file: str, path: str) -> Any:
  try:
    # Namespace: the command line stored in training checkpoints; it holds plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
      return torch.load(file, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    # Only the message names the code in files of PyTorch's legacy format, before version 1.6.
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
      wrong = f"{path}: a pickle with code ({code[1]}), which was not executed"
      raise WeightsError(f"{wrong}; expected tensors only") from None
    raise WeightsError(f"{path}: truncated; expected a PyTorch file") from None
  except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WeightsError(f"{path}: truncated ({reason}); expected a PyTorch file") from None


def _state_dict(torch: Any, found: Any, path: str) -> Mapping[str, Any]:
  candidates = {"": found}
  if isinstance(found, Mapping):
    candidates |= {key: found[key] for key in _TORCH_WRAPPERS if key in found}
  for name, candidate in candidates.items():
    is_mapping = isinstance(candidate, Mapping) and candidate
    if is_mapping and all(isinstance(value, torch.Tensor) for value in candidate.values()):
      if name in _EMA_WRAPPERS and len(candidates) > 2:
        logging.info("%s: reads the moving average of the weights, %r, as timm does", path, name)
      return {str(key): value for key, value in candidate.items()}
  keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else ""
  raise WeightsError(f"{path}: {type(found).__name__} of {keys}; expected a state dict")


def write_state_dict(path: str, arrays: Flat, *, wrapper: str | None = None) -> None:
  """Writes `.safetensors`, else a local PyTorch file, with its arrays under the key `wrapper`."""
  if path.endswith(".safetensors"):
    write_safetensors(path, arrays)
    return
  torch = _import_torch(path, "write a .safetensors file")
  state = {key: torch.from_numpy(np.array(array, order="C")) for key, array in arrays.items()}
  torch.save(state if wrapper is None else {wrapper: state}, path)


def read_safetensors(path: str) -> Flat:
  """Returns a file's arrays by key, 16-bit floats widened to float32."""
  half = ("float16", "bfloat16")
  try:
    # safetensors opens local files only, and cannot read bfloat16 from bytes.
    with local_copy(path) as local, safe_open(local, framework="numpy") as file:
      arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
  except (SafetensorError, OSError, AttributeError) as error:  # numpy has no float8_e4m3fn
    raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
  return {k: x.astype(np.float32) if x.dtype.name in half else x for k, x in arrays.items()}


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
  """Yields a local copy of a file, or the path itself if it is local."""
  if "://" not in path:
    if not epath.Path(path).exists():
      raise WeightsError(f"there is no file {path}")
    yield path
    return
  with epath.Path(path).open("rb") as remote, tempfile.NamedTemporaryFile() as copy:
    shutil.copyfileobj(remote, copy)
    copy.flush()
    yield copy.name


def write_safetensors(path: str, arrays: Flat) -> None:
  """Writes a file that PyTorch's libraries read; local or `gs://bucket/...`."""
  # In row-major order, as their memory is written. `ascontiguousarray` adds an axis to scalars.
  arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
  epath.Path(path).write_bytes(save(arrays, {"format": "pt"}))


# TensorFlow checkpoints, `model.ckpt-<step>.{index,data-...}`: a table of names, `.index`, and raw
# numbers in one or more `.data-00000-of-00032` files. The table is LevelDB's (github.com/google/
# leveldb, doc/table_format.md): blocks of sorted keys, each sharing a prefix with the one before,
# found through a footer. Its values are `BundleEntryProto`s (tensorflow/core/protobuf/
# tensor_bundle.proto): type, shape, shard, offset, size.
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
    prefixes = [str(file).removesuffix(".index") for file in files]
    steps = {prefix: int((re.findall(r"-(\d+)$", prefix) or [-1])[0]) for prefix in prefixes}
    return max(prefixes, key=lambda prefix: steps[prefix], default=None)
  prefix = path.removesuffix(".index")
  index = epath.Path(f"{prefix}.index")
  return prefix if index.exists() and not pathlib.Path(index).is_fifo() else None


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
  except (OSError, LookupError, TypeError, ValueError, DecodeError, struct.error) as error:
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
  """Returns the values of a protocol buffer by field number; its schema is not needed."""
  fields: dict[int, list[Any]] = {}
  for field in UnknownFieldSet(Empty.FromString(message)):
    fields.setdefault(field.field_number, []).append(field.data)
  return fields
