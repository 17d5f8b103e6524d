"""WebDataset shards on a local disk: images with classes in tar files, read by index.

Samples keep their order. Each shard is indexed at its first use, in `<shard>.index.json` beside it,
or in `$VIT_JAX_ZOO_CACHE`; another size or time renews the index.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any, TypeAlias

from vit_jax_zoo.data.images import suffixes
from vit_jax_zoo.data.sources import base, folder

# A sample is the successive files of one name up to its first dot, as in the package webdataset.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset.tariterators.base_plus_ext
_VERSION = 2  # of the index

Keys: TypeAlias = tuple[str | None, str | None, str]  # of image and label, field of a JSON label


class WdsSource(folder.LabelledSource):
  """Samples: name, label, shard, and the offset and length of the image in it."""

  def _load(self, index: int) -> base.Example:
    _, _, shard, offset, length = self._files[index]
    try:
      with open(shard, "rb") as file:
        file.seek(offset)
        return {"image": file.read(length)}
    except OSError as error:
      raise base.CorruptExampleError(f"{shard} cannot be read ({error.strerror})") from None

  def example_name(self, index: int) -> str:
    name, _, shard, *_ = self._files[index]
    return f"{shard}: {name}"


def open_splits(
  location: str,
  image_key: str | None = None,  # default: one of an image's suffix, such as "jpg"
  label_key: str | None = None,  # default: "cls", else "json"
  label_field: str = "label",  # of a JSON object
  class_names: folder.ClassNames = None,
) -> base.Splits:
  """Indexes the shards: FileNotFoundError without, ValueError, with the sample, for a wrong one."""
  name, found = f"wds:{location}", dict[str, folder.Labelled]()
  splits = {shard: _split_of(shard) for shard in _find_shards(location)}
  unnamed = [shard for shard, split in splits.items() if split is None]
  if unnamed and len(unnamed) < len(splits):
    wrong = f"{name}: {unnamed[0]} is not named after a split"
    raise ValueError(f"{wrong}; expected train, test or val")
  for shard, split in splits.items():
    samples = _open_index(shard, (image_key, label_key, label_field))
    found.setdefault(split or "train", []).extend(
      (key, tuple(label) if isinstance(label, list) else label, shard, *place)
      for key, label, *place in samples
    )
  encoded, count, names = folder.encode_labels(
    found, class_names, lambda file: f"{file[2]}: {file[0]}: label"
  )
  opened = functools.partial(WdsSource, base.DatasetInfo(name, 0, count, names), "")
  return folder.hold_out_test({s: functools.partial(opened, f) for s, f in encoded.items()})


def expand_braces(pattern: str) -> list[str]:
  """Returns the texts of a pattern with {000..146} and {a,b}, as a shell does."""
  match = re.search(r"\{([^{}]*)\}", pattern)
  if match is None:
    return [pattern]
  options = match[1].split(",")
  if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
    numbers = range(int(bounds[1]), int(bounds[2]) + 1)
    options = [str(number).zfill(len(bounds[1])) for number in numbers]
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [text for option in options for text in expand_braces(before + option + after)]


def _find_shards(location: str) -> list[str]:
  path = os.path.expanduser(location)
  if os.path.isdir(path):
    shards = sorted(map(str, pathlib.Path(path).rglob("*.tar")))
  else:
    shards = expand_braces(path)
  missing = [shard for shard in shards if not os.path.isfile(shard)] if shards else ["*.tar"]
  if missing:
    expected = "a folder of *.tar files (not .gz) or a brace pattern of them, on a local disk"
    raise FileNotFoundError(f"wds:{location}: {missing[0]} is missing; expected {expected}")
  return shards


def _split_of(shard: str) -> str | None:
  path = pathlib.Path(shard)
  words = map(folder.split_of, re.findall("[a-z]+", path.stem.lower()))
  return next(filter(None, words), folder.split_of(path.parent.name))


def _open_index(shard: str, keys: Keys) -> list[list[Any]]:
  """Returns name, label, offset and length of each sample; reads or writes the index."""
  stat, file = os.stat(shard), pathlib.Path(f"{shard}.index.json")
  version = [_VERSION, stat.st_size, stat.st_mtime_ns, *keys]
  digest = hashlib.blake2b(os.fsencode(os.path.abspath(shard)), digest_size=8).hexdigest()
  files = [file, base.cache_dir() / "wds" / f"{digest}.index.json"]
  for file in files:
    with contextlib.suppress(OSError, ValueError, RecursionError):
      content = json.loads(file.read_bytes())
      if isinstance(content, dict) and content.get("version") == version:
        return content["samples"]
  try:
    with tarfile.open(shard, "r:") as tar:
      samples = list(_read_samples(tar, shard, keys))
  except tarfile.TarError as error:
    if shard.endswith("gz"):
      raise ValueError(f"{shard}: compressed; expected a tar file. gunzip {shard}") from None
    raise ValueError(f"{shard}: not a whole tar file ({error}); copy it again") from None
  content = json.dumps({"version": version, "samples": samples})
  for file in files:
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a read-only folder, or a full disk
      file.parent.mkdir(parents=True, exist_ok=True)
      unfinished.write_text(content)
      unfinished.replace(file)
      break
    with contextlib.suppress(OSError):
      unfinished.unlink()
  return samples


def _read_samples(tar: tarfile.TarFile, shard: str, keys: Keys) -> Iterator[list[Any]]:
  files, (image_key, label_key, label_field) = tar.getmembers(), keys
  with open(shard, "rb") as stream:  # tarfile takes a damaged header for the end
    stream.seek(tar.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise tarfile.ReadError(f"it ends at byte {tar.offset}")
  named = ((match, member) for member in files if (match := _NAME.fullmatch(member.name)))
  for name, group in itertools.groupby(named, key=lambda pair: pair[0][1]):
    members = [(match[2].lower(), m) for match, m in group if m.isreg() and not m.issparse()]
    found = dict(members)
    pictures = [key for key in found if f".{key.rpartition('.')[2]}" in suffixes()]
    image = image_key or min(pictures, key=lambda key: key.count("."), default="jpg")
    label = label_key or ("json" if "json" in found and "cls" not in found else "cls")
    if len(found) < len(members) or image not in found or label not in found:
      wrong = f"{shard}: {name} has {', '.join(key for key, _ in members)}"
      raise ValueError(f"{wrong}; expected one {image} and one {label} (image_key, label_key)")
    data = tar.extractfile(found[label])
    value = _parse(data.read() if data else b"", label, label_field, f"{shard}: {name}.{label}")
    yield [name, value, found[image].offset_data, found[image].size]


def _parse(data: bytes, key: str, field: str, where: str) -> Any:
  try:
    if key.endswith("json"):
      value = json.loads(data)
      return value[field] if isinstance(value, dict) else value
    text = data.decode().strip()
  except (ValueError, KeyError, RecursionError) as error:
    raise ValueError(f"{where}: no label ({error}); expected JSON with {field}, or text") from None
  return int(text) if text.removeprefix("-").isdecimal() else text
