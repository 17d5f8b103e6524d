"""Prepared TFDS datasets: by name, version and path, local or in a bucket."""

import json
import shutil
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from tests.data.images import encode, photo
from vit_jax_zoo.data import prepare
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources import tfds as tfds_source
from vit_jax_zoo.data.sources.base import CorruptExampleError


@pytest.fixture
def bucket(monkeypatch):
  """Maps gs://bucket/data to a local folder; returns the list of requested paths."""

  def fake_bucket(folder):
    requested = []

    def path(location):
      requested.append(str(location))
      return epath.Path(str(location).replace("gs://bucket/data", str(folder)))

    monkeypatch.setattr(tfds_source, "epath", types.SimpleNamespace(Path=path))
    return requested

  return fake_bucket


def test_load_by_name_version_path(prepared):
  sources = [
    load_source("tfds:tiny", "train", data_dir=str(prepared)),
    load_source("tfds:tiny:1.2.0", "train", data_dir=str(prepared)),
    load_source(f"tfds:{prepared}/tiny/1.2.0", "train"),
  ]
  for source in sources:
    assert len(source) == 20
    assert source.info.class_names == ("a", "b", "c", "d", "e")
    assert [source[i]["label"] for i in range(20)] == [sources[0][i]["label"] for i in range(20)]
    assert set(source[0]) == {"image", "label"}
    assert isinstance(source[0]["image"], bytes)
  assert sources[0].example_name(3) == "tfds:tiny train[3]"


def test_data_dir_from_environment(prepared, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  assert len(load_source("tfds:tiny", "test[:4]")) == 4


def test_multilabel(prepared):
  source = load_source("tfds:tiny", "train", data_dir=str(prepared), label_key="labels")
  counts = sorted(len(source[i]["label"]) for i in range(20))
  assert counts == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
  assert all(source[i]["label"].dtype == np.int32 for i in range(20))
  assert source.info.num_classes == 5


def test_missing_dataset_names_prepare_command(prepared):
  with pytest.raises(FileNotFoundError) as error:
    load_source("tfds:imagenet2012", "train", data_dir=str(prepared))
  message = str(error.value)
  assert "\n" not in message
  command = "python -m vit_jax_zoo.data.prepare --dataset=imagenet2012 --data_dir="
  assert command + str(prepared) in message
  assert "demo:digits" in message


def test_missing_version_lists_versions(prepared):
  with pytest.raises(FileNotFoundError, match=r"available: 1\.2\.0"):
    load_source("tfds:tiny:9.9.9", "train", data_dir=str(prepared))


def test_unknown_feature_raises(prepared):
  with pytest.raises(ValueError, match="no feature 'lable'"):
    load_source("tfds:tiny", "train", data_dir=str(prepared), label_key="lable")


def test_bucket_dataset_loaded(prepared, bucket):
  requested = bucket(prepared)
  sources = [
    load_source("tfds:tiny", "train", data_dir="gs://bucket/data"),
    load_source("tfds:tiny:1.2.0", "train", data_dir="gs://bucket/data/"),
    load_source("tfds:gs://bucket/data/tiny/1.2.0", "train"),
  ]
  assert requested[0] == "gs://bucket/data"
  assert requested[-1] == "gs://bucket/data/tiny/1.2.0"
  assert all(len(source) == 20 and isinstance(source[0]["image"], bytes) for source in sources)


def test_epath_keeps_bucket_slashes():
  assert str(epath.Path("gs://bucket/data") / "tiny" / "1.2.0") == "gs://bucket/data/tiny/1.2.0"


def test_remote_tfrecord_raises(prepared_as_tfrecord, monkeypatch):
  files = property(lambda _: [epath.Path("gs://bucket/tiny.tfrecord")])
  monkeypatch.setattr(tfds.core.SplitInfo, "filepaths", files)
  with pytest.raises(ValueError, match="read by index") as error:
    load_source("tfds:tiny", "train", data_dir=str(prepared_as_tfrecord))
  assert "\n" not in str(error.value)


def test_packed_folder_validation_aliases(tmp_path):
  for path in ("train/x/1.png", "val/x/2.png"):
    (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "images" / path).write_bytes(encode(photo(8, 8), "PNG"))
  prepare.prepare_folder(str(tmp_path / "images"), "packed", tmp_path)
  for split in ("val", "valid", "validation"):
    assert len(load_source("tfds:packed", split, data_dir=str(tmp_path))) == 1
  with pytest.raises(ValueError, match="unknown split 'test'"):
    load_source("tfds:packed", "test", data_dir=str(tmp_path))


def test_damaged_files_raise(prepared, tmp_path):
  folder = shutil.copytree(prepared / "tiny" / "1.2.0", tmp_path / "tiny")
  for file in folder.glob("*train.array_record*"):
    file.write_bytes(file.read_bytes()[:-100])
  source = load_source(f"tfds:{folder}", "train")
  with pytest.raises(CorruptExampleError, match="Riegeli"):
    [source[i] for i in range(len(source))]
  info = json.loads((folder / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": 0}))
  with pytest.raises(ValueError, match=rf"{folder}: dataset_info.json .*splits"):
    load_source(f"tfds:{folder}", "train")


def test_path_without_dataset_raises(prepared):
  with pytest.raises(FileNotFoundError, match="expected the innermost folder"):
    load_source(f"tfds:{prepared}/tiny", "train")
