"""Fixtures of the data tests: small photographs, class folders, prepared datasets."""

import json
import os
import struct

import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from tests.data.images import encode, photo


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  """A cache of this folder's tests, in all worker processes; others use the user's cache."""
  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("VIT_JAX_ZOO_CACHE", str(folder / "cache"))
    yield folder / "cache"


@pytest.fixture
def class_folders(tmp_path):
  """60 images in three classes, plus a text file in a class folder and one beside them."""
  for i in range(60):
    folder = tmp_path / "images" / ("ant", "bee", "cow")[i % 3]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{i:02}.jpg").write_bytes(encode(photo(30 + i % 7, 40, seed=i)))
  (folder / "notes.txt").write_text("not an image")
  (tmp_path / "images" / "readme.md").write_text("not a class")
  return tmp_path / "images"


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """20 training and 6 test images of 5 classes, some with several labels."""

  VERSION = tfds.core.Version("1.2.0")

  def _info(self):
    label = tfds.features.ClassLabel(names=["a", "b", "c", "d", "e"])
    features = {
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
      "label": label,
      "labels": tfds.features.Sequence(label),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 26)}

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      yield (
        i,
        {
          "file_name": f"{i}.jpg",
          "image": encode(photo(30 + i, 44, seed=i)),
          "label": i % 5,
          "labels": list(range(i % 5)),
        },
      )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """data_dir with Tiny as ArrayRecord."""
  root = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  Tiny(data_dir=root, file_format="array_record").download_and_prepare()
  return root


@pytest.fixture(scope="session")
def prepared_as_tfrecord(prepared, tmp_path_factory):
  """The same records in TFRecord framing, as older TFDS versions wrote them."""
  source = prepared / "tiny" / "1.2.0"
  root = tmp_path_factory.mktemp("tfrecord")
  target = root / "tiny" / "1.2.0"
  target.mkdir(parents=True)
  for file in source.iterdir():
    if ".array_record" not in file.name:
      (target / file.name).write_bytes(file.read_bytes())
      continue
    reader = array_record_module.ArrayRecordReader(str(file))
    records = reader.read_all()
    reader.close()
    framed = [struct.pack("<QI", len(r), 0) + r + struct.pack("<I", 0) for r in records]
    (target / file.name.replace("array_record", "tfrecord")).write_bytes(b"".join(framed))
  info = json.loads((target / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (target / "dataset_info.json").write_text(json.dumps(info))
  return root
