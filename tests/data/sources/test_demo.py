"""Single-image demos, prepared from images of scikit-learn and scikit-image."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.sources import demo as demos
from vit_jax_zoo.data.sources import load_source


def test_digits_split_sizes():
  train, test = (load_source("demo:digits", split) for split in ("train", "test"))
  assert (len(train), len(test)) == (1437, 360)
  assert train.info.class_names == tuple("0123456789")
  counts = np.bincount([test[i]["label"] for i in range(360)])
  assert counts.min() >= 34  # stratified
  assert counts.max() <= 37


def test_digits_equal_scikit_learn():
  from sklearn.datasets import load_digits

  sources = [load_source("demo:digits", split) for split in ("train", "test")]
  examples = [source[i] for source in sources for i in range(len(source))]
  ours = sorted((e["label"], decode_image(e["image"])[..., 0].tobytes()) for e in examples)
  pixels, targets = load_digits(return_X_y=True)
  pixels = np.round(pixels * 255 / 16).astype(np.uint8)
  assert ours == sorted((int(t), p.tobytes()) for p, t in zip(pixels, targets, strict=True))


def test_photos_split_sizes():
  train, test = (load_source("demo:photos", split) for split in ("train", "test"))
  assert train.info.num_classes == len(demos.PHOTOS) == 10
  assert {test[i]["label"] for i in range(len(test))} == set(range(10))
  assert decode_image(train[0]["image"]).shape == (64, 64, 3)
  assert 0.19 < len(test) / (len(test) + len(train)) < 0.21
  for name in demos.PHOTOS:
    assert demos.read_photo(name).std() > 20, name


def test_result_of_faster_process_used(tmp_path, monkeypatch):
  """Another process prepares the same demo while this one writes its records."""
  few = demos.Demo(lambda split: itertools.islice(demos.digits(split), 5), demos.DEMOS["digits"][1])
  monkeypatch.setitem(demos.DEMOS, "digits", few)
  monkeypatch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path))
  write = demos.tfds_source.write_dataset

  def write_last(*args, **kwargs):
    monkeypatch.setattr(demos.tfds_source, "write_dataset", write)
    load_source("demo:digits", "test")
    return write(*args, **kwargs)

  monkeypatch.setattr(demos.tfds_source, "write_dataset", write_last)
  assert len(load_source("demo:digits", "test")) == 5
  assert demos.tfds_source.write_dataset is write
  assert os.listdir(tmp_path / "demos" / "digits") == ["1.0.0"]


@pytest.mark.long
def test_concurrent_prepare(tmp_path):
  program = (
    "from vit_jax_zoo.data.sources import load_source; s = load_source('demo:digits', 'test'); "
    "print(sum(s[i]['label'] for i in range(len(s))))"
  )
  env = {**os.environ, "VIT_JAX_ZOO_CACHE": str(tmp_path)}
  command = [sys.executable, "-W", "error", "-c", program]
  runs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
  outputs = {run.communicate()[0] for run in runs}
  assert [run.returncode for run in runs] == [0, 0]
  assert len(outputs) == 1
  assert os.listdir(tmp_path / "demos" / "digits") == ["1.0.0"]


def test_unwritable_cache_raises(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path / "file"))
  with pytest.raises(OSError, match="set VIT_JAX_ZOO_CACHE"):
    load_source("demo:digits", "train")
