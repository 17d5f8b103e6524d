"""WebDataset shards, written by its package: samples, splits, index, exact resume, errors."""

import gc
import gzip
import itertools
import json
import os
import tarfile
import warnings

import numpy as np
import pytest
import webdataset

from tests.data.images import encode, photo
from vit_jax_zoo.data.pipeline import train_batches
from vit_jax_zoo.data.sources import load_source, wds
from vit_jax_zoo.data.transforms import build_transforms


def write(file, samples):
  file.parent.mkdir(parents=True, exist_ok=True)
  with webdataset.TarWriter(str(file)) as writer:
    for sample in samples:
      writer.write(sample)


def samples(start, stop):
  for i in range(start, stop):
    yield {"__key__": f"dir.x/{i:03}", "jpg": encode(photo(20, 24, seed=i)), "cls": i % 3}


@pytest.fixture
def shards(tmp_path):
  for number in range(3):
    write(tmp_path / f"train-{number:03}.tar", samples(10 * number, 10 * number + 10))
  write(tmp_path / "val-000.tar", samples(30, 34))
  return tmp_path


def test_samples_equal_those_of_webdataset(shards):
  source = load_source(f"wds:{shards}/train-{{000..002}}.tar", "all")
  files = [str(shards / f"train-{number:03}.tar") for number in range(3)]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it leaves the shards open
    expected = [*webdataset.WebDataset(files, shardshuffle=False)]
    gc.collect()
  assert len(source) == len(expected) == 30
  for i, sample in enumerate(expected):
    assert source[i] == {"image": sample["jpg"], "label": int(sample["cls"])}
    assert source.example_name(i) == f"{sample['__url__']}: {sample['__key__']}"
  assert source.info.num_classes == 3


@pytest.mark.parametrize("location", ["", "/{train,val}-000.tar"])
def test_splits_by_shard_names(location, shards):
  train, test = (load_source(f"wds:{shards}{location}", split) for split in ("train", "test"))
  assert (len(train), len(test)) == (10 if location else 30, 4)
  assert test.labels().tolist() == [0, 1, 2, 0]


def test_hash_split_is_stratified(shards):
  parts = {s: load_source(f"wds:{shards}/train-{{000..002}}.tar", s) for s in ("train", "test")}
  assert len(parts["train"]) + len(parts["test"]) == 30
  assert set(parts["test"].labels()) == {0, 1, 2}


def test_resume_is_exact(shards):
  transforms = build_transforms([dict(name="random_resized_crop", size=16)])
  name = f"wds:{shards}"
  options = dict(batch_size=4, seed=3, num_threads=2)
  with train_batches(load_source(name, "train"), transforms, **options) as batches:
    whole = [*itertools.islice(batches, 12)]
  with train_batches(load_source(name, "train"), transforms, start_step=7, **options) as batches:
    for batch, expected in zip(batches, whole[7:], strict=False):
      for key in ("image", "label"):
        np.testing.assert_array_equal(batch[key], expected[key])


def test_index_is_cached_and_renewed(shards, monkeypatch):
  name, read = f"wds:{shards}/val-000.tar", []
  original = wds._read_samples
  monkeypatch.setattr(wds, "_read_samples", lambda *args: read.append(1) or original(*args))
  first = load_source(name, "test")
  assert (shards / "val-000.tar.index.json").is_file()
  assert load_source(name, "test")[2] == first[2]
  assert len(read) == 1
  write(shards / "val-000.tar", samples(40, 46))
  assert len(load_source(name, "test")) == 6
  assert len(read) == 2
  (shards / "val-000.tar.index.json").write_text("damaged")
  assert len(load_source(name, "test")) == 6
  assert len(read) == 3


def test_index_of_read_only_folder_is_in_the_cache(shards, monkeypatch):
  replace, folder = os.replace, str(shards)

  def refuse(source, target):
    if str(target).startswith(folder):
      raise PermissionError(13, "Permission denied")
    replace(source, target)

  monkeypatch.setattr(os, "replace", refuse)
  assert len(load_source(f"wds:{shards}/val-000.tar", "test")) == 4
  assert [*shards.glob("*.json*")] == []
  monkeypatch.setattr(wds, "_read_samples", None)
  assert len(load_source(f"wds:{shards}/val-000.tar", "test")) == 4


@pytest.mark.parametrize(
  ("label", "options", "expected", "names"),
  [
    ({"json": {"label": [0, 2]}}, {}, [0, 2], ()),
    ({"json": {"kind": "dog"}}, {"label_field": "kind"}, 1, ("cat", "dog")),
    ({"json": 1}, {}, 1, ()),
    ({"cls": "dog"}, {"class_names": ("dog", "cat")}, 0, ("dog", "cat")),
    ({"txt": "dog", "cls": 3}, {"label_key": "txt"}, 1, ("cat", "dog")),
  ],
)
def test_labels(label, options, expected, names, tmp_path):
  other = (
    {"json": {"label": [], "kind": "cat"}} if "json" in label else {"txt": "cat", "cls": "cat"}
  )
  if label == {"json": 1}:
    other = {"json": 0}
  images = {"png": encode(photo(8, 8), "PNG"), "seg.png": b""}
  write(
    tmp_path / "0.tar", [{"__key__": "a", **images, **label}, {"__key__": "b", **images, **other}]
  )
  source = load_source(f"wds:{tmp_path}", "all", **options)
  assert source[0]["image"] == images["png"]
  np.testing.assert_array_equal(source[0]["label"], expected)
  assert source.info.class_names == names


JPEG = {"jpg": b"\xff\xd8"}


@pytest.mark.parametrize(
  ("sample", "options", "message"),
  [
    ({"cls": 1}, {}, r"0\.tar: a has cls; expected one jpg"),
    ({**JPEG}, {}, r"0\.tar: a has jpg; expected .* cls"),
    ({**JPEG, "json": {"name": "x"}}, {}, r"0\.tar: a\.json: no label"),
    ({**JPEG, "json": b"[" * 100_000}, {}, r"0\.tar: a\.json: no label"),
    ({**JPEG, "cls": 10**9}, {}, r"0\.tar: a: label 1000000000: no class"),
    ({**JPEG, "json": {"label": 0.5}}, {}, r"0\.tar: a: label 0\.5"),
    ({**JPEG, "cls": -1}, {}, r"0\.tar: a: label -1: no class"),
    ({**JPEG, "json": {"label": ["Cat", "cat"]}}, {}, r"0\.tar: a: label 'cat'.*'Cat'"),
    ({**JPEG, "cls": 7}, {"class_names": ("x", "y")}, r"0\.tar: a: label 7"),
  ],
)
def test_wrong_sample_raises(sample, options, message, tmp_path):
  write(tmp_path / "0.tar", [{"__key__": "a", **sample}])
  with pytest.raises(ValueError, match=message) as error:
    load_source(f"wds:{tmp_path}", "all", **options)
  assert "\n" not in str(error.value)


def test_wrong_shards_raise(shards):
  with pytest.raises(FileNotFoundError, match=r"train-003\.tar is missing"):
    load_source(f"wds:{shards}/train-{{002..004}}.tar", "train")
  with pytest.raises(FileNotFoundError, match="wds:gs://"):
    load_source("wds:gs://bucket/{0..3}.tar", "train")
  shard = shards / "train-000.tar"
  shard.rename(shards / "more-000.tar")
  with pytest.raises(ValueError, match=r"more-000\.tar is not named after a split"):
    load_source(f"wds:{shards}", "train")
  (shards / "more-000.tar").unlink()
  whole = (shards / "train-001.tar").read_bytes()
  (shards / "train-001.tar").write_bytes(whole[:2000])
  with pytest.raises(ValueError, match=r"train-001\.tar: not a whole tar file"):
    load_source(f"wds:{shards}", "train")
  (shards / "a.tar.gz").write_bytes(gzip.compress(whole))
  with pytest.raises(ValueError, match=r"a\.tar\.gz: compressed; .* gunzip "):
    load_source(f"wds:{shards}/a.tar.gz", "train")


def test_file_twice_in_a_sample_raises(tmp_path):
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    (tmp_path / "label").write_text(json.dumps(1))
    for name in ("a.jpg", "a.cls", "a.cls"):
      tar.add(tmp_path / "label", name)
  with pytest.raises(ValueError, match=r"0\.tar: a has jpg, cls, cls"):
    load_source(f"wds:{tmp_path}", "all")
