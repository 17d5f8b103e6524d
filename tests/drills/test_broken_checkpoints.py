"""Drill: damaged published checkpoints; each raises a one-line error."""

import io
import json
import random
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import GOLDENS
from vit_jax_zoo import load_pretrained

pytestmark = pytest.mark.slow

FILES = {
  "vit_npz": "vit_a/weights.npz",
  "vit_timm": "vit_timm_a/weights.safetensors",
  "vit_hf": "vit_hf_a/model.safetensors",
  "imagegpt": "imagegpt_a/weights.safetensors",
}


@pytest.fixture
def published(request, tmp_path):
  """A complete checkpoint file, with its JSON files."""
  name = request.getfixturevalue("name")
  source = GOLDENS / FILES[name]
  suffix = source.suffix
  file = tmp_path / f"model{suffix}"
  shutil.copy(source, file)
  file.chmod(0o644)
  if name == "vit_hf":
    shutil.copy(source.with_name("config.json"), tmp_path)
  if name == "imagegpt":
    config = json.loads(source.with_name("config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"n_head": config["n_head"]}))
    clusters = np.load(source.with_name("inputs.npz"))["clusters"].astype(float).tolist()
    processor = {"clusters": clusters, "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
  return file


def to_load(file):
  return str(
    file if file.suffix == ".npz" or len(list(file.parent.iterdir())) == 1 else file.parent
  )


# --- any container: bytes ------------------------------------------------------------------------


def cut(fraction):
  return lambda data: data[: int(len(data) * fraction)]


def overwrite(at, new):
  return lambda data: data[:at] + new + data[at + len(new) :]


NOISE = random.Random(0).randbytes(4096)
BYTES = {
  "empty": lambda data: b"",
  "seven_bytes": lambda data: data[:7],
  "first_tenth": cut(0.1),
  "first_half": cut(0.5),
  "last_byte_missing": lambda data: data[:-1],
  "zeros": lambda data: bytes(len(data)),
  "noise": lambda data: NOISE,
  "first_bytes_missing": lambda data: data[16:],
  "noise_at_start": overwrite(0, NOISE[:64]),
  "html_page": lambda data: b"<!DOCTYPE html><html>Not found</html>",
  "git_lfs_pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
  "twice": lambda data: data + data[: len(data) // 2],
}


# --- .npz and .safetensors: headers --------------------------------------------------------------


def change_header(change):
  """Rewrites a safetensors file's JSON header; the data is unchanged."""

  def broken(data):
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = sorted(key for key in header if key != "__metadata__")[3]
    change(header[name])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]

  return broken


HEADERS = {
  "header_longer_than_file": overwrite(0, (2**40).to_bytes(8, "little")),
  "empty_header": overwrite(0, bytes(8)),
  "header_not_json": overwrite(8, b"}"),
  "unknown_dtype": change_header(lambda entry: entry.update(dtype="Q7")),
  "offsets_beyond_end": change_header(lambda entry: entry.update(data_offsets=[0, 2**40])),
  "offsets_reversed": change_header(lambda entry: entry["data_offsets"].reverse()),
  "shape_of_other_size": change_header(lambda entry: entry.update(shape=[3, 5, 7])),
}


def flip_byte_in_member(data):
  """Flips a byte inside the largest array, which makes the zip's checksum wrong."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    largest = max(archive.infolist(), key=lambda member: member.compress_size)
  at = largest.header_offset + largest.compress_size // 2
  return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def replace_member(content):
  def broken(data):
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
      for i, member in enumerate(old.namelist()):
        new.writestr(member, content if i == 2 else old.read(member))
    return result.getvalue()

  return broken


def pickled_objects():
  buffer = io.BytesIO()
  np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
  return buffer.getvalue()


ARCHIVES = {
  "flipped_byte": flip_byte_in_member,
  "missing_directory": lambda data: data[: data.rindex(b"PK\x01\x02")],
  "empty_member": replace_member(b""),
  "noise_member": replace_member(NOISE),
  "pickled_member": replace_member(pickled_objects()),
}


# --- arrays ---------------------------------------------------------------------------------------


def largest(arrays):
  return max(sorted(arrays), key=lambda key: arrays[key].size)


def without(choose):
  return lambda arrays: {key: a for key, a in arrays.items() if key != choose(arrays)}


def with_largest(change):
  return lambda arrays: arrays | {largest(arrays): change(arrays[largest(arrays)])}


ARRAYS = {
  "largest_missing": without(largest),
  "first_missing": without(min),
  "last_missing": without(max),
  "extra_array": lambda arrays: arrays | {f"{min(arrays)}_of_another": np.ones(3, np.float32)},
  "row_missing": with_largest(lambda array: array[:-1]),
  "axis_missing": with_largest(lambda array: array[..., 0].copy()),
  "extra_axis": with_largest(lambda array: array[None].copy()),
  "empty_array": with_largest(lambda array: array[:0].copy()),
  "no_arrays": lambda arrays: {},
  "unknown_names": lambda arrays: {f"x{i}": a for i, a in enumerate(arrays.values())},
  "half_of_arrays": lambda arrays: dict(sorted(arrays.items())[::2]),
}


def write_arrays(file, change):
  if file.suffix == ".npz":
    np.savez(file, **change(dict(np.load(file))))
  else:
    save_file(change(load_file(file)), file)


CASES = [
  (name, kind, damage)
  for name, file in FILES.items()
  for kind, damages in {
    "bytes": BYTES,
    "archive": ARCHIVES if file.endswith("npz") else {},
    "header": {} if file.endswith("npz") else HEADERS,
    "arrays": ARRAYS,
  }.items()
  for damage in damages
  # Hugging Face's ImageGPT without its first array, the head, is a complete encoder.
  if (name, damage) != ("imagegpt", "first_missing")
]


def test_at_least_fifty_cases():
  assert len(CASES) >= 50


@pytest.mark.parametrize("name", FILES)
def test_intact_checkpoint_loads(name, published):
  assert load_pretrained(to_load(published)).variables["params"]


@pytest.mark.parametrize(("name", "kind", "damage"), CASES)
def test_damaged_checkpoint_raises(name, kind, damage, published):
  if kind == "arrays":
    write_arrays(published, ARRAYS[damage])
  else:
    damages = {"bytes": BYTES, "archive": ARCHIVES, "header": HEADERS}[kind]
    published.write_bytes(damages[damage](published.read_bytes()))
  with pytest.raises(ValueError, match=r"\S") as error:
    load_pretrained(to_load(published))
  message = str(error.value)
  assert "\n" not in message
  assert "model" in message or str(published.parent) in message, "the error does not name the file"
