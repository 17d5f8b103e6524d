"""Datasets of the package `datasets`, saved by it: labels, objects, label maps, errors."""

import pickle
import re

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from tests.data.images import photo
from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.pipeline import eval_batches
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.coco import THINGS
from vit_jax_zoo.data.transforms import build_transforms

NAMES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  datasets.disable_progress_bars()


def images(count):
  return [Image.fromarray(photo(20, 24 + i, seed=i)) for i in range(count)]


def rows(features, **columns):
  count = len(next(iter(columns.values())))
  features = Features({"image": datasets.Image(), **features})
  return Dataset.from_dict({"image": images(count), **columns}, features=features)


def labelled(count, start=0):
  labels = [i % 3 for i in range(start, start + count)]
  return rows({"label": ClassLabel(names=list(NAMES))}, label=labels)


def saved(dataset, root):
  dataset.save_to_disk(root / "saved")
  return f"hf:{root / 'saved'}"


def test_saved_dataset_has_stratified_splits(tmp_path):
  name = saved(labelled(30), tmp_path)
  parts = {s: load_source(name, s) for s in ("train", "test", "all", "fit", "choose", "val")}
  assert parts["all"].info.class_names == NAMES
  assert [parts["all"][i]["label"] for i in range(30)] == [i % 3 for i in range(30)]
  np.testing.assert_array_equal(decode_image(parts["all"][4]["image"]), photo(20, 28, seed=4))
  assert parts["all"].example_name(4) == f"{name} train[4]"
  assert set(parts["test"].labels()) == {0, 1, 2}
  assert len(parts["train"]) + len(parts["test"]) == 30
  members = {s: {p.example_name(i) for i in range(len(p))} for s, p in parts.items()}
  assert members["fit"] | members["choose"] == members["train"]
  assert members["test"] == members["val"] == members["all"] - members["train"]
  assert pickle.loads(pickle.dumps(parts["test"]))[0] == parts["test"][0]


def test_parquet_folder(tmp_path):
  for split, count in (("train", 5), ("test", 3)):
    labelled(count).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
  train, val = (load_source(f"hf:{tmp_path / 'data'}", split) for split in ("train", "val"))
  assert (len(train), len(val)) == (5, 3)
  transforms = build_transforms([dict(name="resize", size=8)])
  batches = [*eval_batches(train, transforms, batch_size=5)]
  assert batches[0]["image"].shape == (5, 8, 8, 3)
  np.testing.assert_array_equal(batches[0]["label"], [0, 1, 2, 0, 1])


def test_texts_and_several_labels(tmp_path):
  name = saved(rows({"label": Value("string")}, label=["x", "z", "x", "y"]), tmp_path / "text")
  source = load_source(name, "all")
  assert source.info.class_names == ("x", "y", "z")
  np.testing.assert_array_equal(source.labels(), [0, 2, 0, 1])
  kind = List(ClassLabel(names=list(NAMES)))
  source = load_source(saved(rows({"labels": kind}, labels=[[0, 2], []]), tmp_path), "all")
  assert (source.labels(), source.info.num_classes) == (None, 3)
  assert [source[i]["label"].tolist() for i in range(2)] == [[0, 2], []]


def test_test_split_without_labels_raises_when_opened(tmp_path):
  label = {"label": ClassLabel(names=list(NAMES))}
  splits = {"train": labelled(4), "test": rows(label, label=[-1, -1])}
  name = saved(DatasetDict(splits), tmp_path)
  assert len(load_source(name, "train")) == 4
  with pytest.raises(ValueError, match=r"test\[0\]\.label: -1"):
    load_source(name, "test")


OBJECTS = {
  "bbox": [[[2, 3, 10, 8], [0, 0, -1, 4], [1, 1, 4, 4]], []],
  "category": [[1, 0, 0], []],
  "iscrowd": [[0, 0, 1], []],
}


@pytest.mark.parametrize("as_list", [False, True], ids=["columns", "list"])
def test_objects(as_list, tmp_path, caplog):
  fields = {"bbox": List(Value("float32"), length=4), "category": ClassLabel(names=["nut", "bolt"])}
  fields["iscrowd"] = Value("int64")
  columns = [{key: OBJECTS[key][i] for key in OBJECTS} for i in range(2)]
  if as_list:
    kind = {"objects": List(fields)}
    columns = [[{key: c[key][i] for key in c} for i in range(len(c["bbox"]))] for c in columns]
  else:
    kind = {"objects": {key: List(feature) for key, feature in fields.items()}}
  source = load_source(saved(rows(kind, objects=columns), tmp_path), "all")
  assert source.info.class_names == ("nut", "bolt")
  assert (source.info.max_objects, source.info.num_objects) == (3, 1)
  assert "1 boxes" in caplog.text
  example = source[0]
  np.testing.assert_array_equal(example["boxes_xyxy"], [[2, 3, 12, 11], [1, 1, 5, 5]])
  np.testing.assert_array_equal(example["labels"], [1, 0])
  np.testing.assert_array_equal(example["area"], [80, 16])
  np.testing.assert_array_equal(example["is_crowd"], [False, True])
  assert source[1]["boxes_xyxy"].shape == (0, 4)
  load = build_transforms([dict(name="load_objects"), dict(name="pad_objects", num=2)])
  assert next(iter(eval_batches(source, load, batch_size=1)))["labels"].shape == (1, 2)


@pytest.mark.parametrize(
  ("options", "box"),
  [
    ({"box_format": "xyxy"}, (2, 3, 12, 11)),
    ({"box_format": "cxcywh", "relative_boxes": True}, (7 / 24, 7 / 20, 10 / 24, 8 / 20)),
  ],
)
def test_box_formats(options, box, tmp_path):
  kind = {"objects": {"bbox": List(List(Value("float64"))), "category": List(Value("string"))}}
  name = saved(rows(kind, objects=[{"bbox": [box], "category": ["bolt"]}] * 2), tmp_path)
  example = load_source(name, "all", class_names=("nut", "bolt"), **options)[0]
  np.testing.assert_allclose(example["boxes_xyxy"], [[2, 3, 12, 11]], atol=1e-5)
  assert example["labels"] == [1]
  with pytest.raises(ValueError, match=r"objects\.category .*class_names"):
    load_source(name, "all", **options)
  with pytest.raises(ValueError, match=r"train\[0\]\.objects\.category: 'bolt'"):
    load_source(name, "all", class_names=("nut",), **options)


def with_objects(fields, root):
  fields = {"bbox": [[2, 3, 9, 8]], "category": ["x"], **fields}
  kind = {key: List(Value("float64")) for key in fields}
  kind |= {"bbox": List(List(Value("float64"))), "category": List(Value("string"))}
  return saved(rows({"objects": kind}, objects=[fields] * 2), root)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"bbox": [[2, 3, 9, 8, 1]] * 4, "category": ["x"] * 5}, r"bbox: .* 4 numbers"),
    ({"iscrowd": [2]}, r"iscrowd: \[2"),
    ({"area": [5, 6]}, r"area: \[5"),
  ],
)
def test_wrong_objects_raise(fields, message, tmp_path):
  name = with_objects(fields, tmp_path)
  with pytest.raises(ValueError, match=rf"train\[0\]\.objects\.{message}"):
    load_source(name, "train", class_names=("x",))


@pytest.mark.parametrize(
  ("fields", "options", "message"),
  [
    ({"bbox": [[0.1, 0.1, 0.5, 0.5]]}, {}, "2 of 2 boxes are in .*relative_boxes=True"),
    ({}, {"relative_boxes": True}, "2 of 2 boxes are beyond .*relative_boxes=False"),
    ({"area": [np.nan]}, {}, "^$"),
  ],
)
def test_suspicious_objects_are_named(fields, options, message, tmp_path, caplog):
  name = with_objects(fields, tmp_path)
  source = load_source(name, "train", class_names=("x",), **options)
  assert re.search(message, caplog.text)
  assert source[0]["area"] > 0


def test_coco_classes_have_their_ids(tmp_path):
  kind = {
    "bbox": List(List(Value("int64"))),
    "category": List(ClassLabel(names=[*THINGS.values()])),
  }
  objects = [{"bbox": [[0, 0, 4, 4]], "category": [79]}]
  source = load_source(saved(rows({"objects": kind}, objects=objects), tmp_path), "all")
  assert (source[0]["labels"], source.info.num_classes) == ([90], 91)


def test_label_maps(tmp_path):
  maps = [Image.fromarray(np.full((20, 24 + i), i, np.uint8)) for i in range(2)]
  name = saved(rows({"annotation": datasets.Image()}, annotation=maps), tmp_path)
  (tmp_path / "saved" / "classes.txt").write_text("road\nroof\n")
  source = load_source(name, "all")
  assert source.info.class_names == ("road", "roof")
  load = build_transforms([dict(name="load_label_map")])
  labels = [batch["label_map"] for batch in eval_batches(source, load, batch_size=1)]
  assert [np.unique(label).tolist() for label in labels] == [[0], [1]]
  assert load_source(name, "all", label_key="annotation").info.num_classes == 2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"label_key": "lable"}, "column of hf:.*'lable'.*'label'"),
    ({"box_format": "yxyx"}, "box_format 'yxyx'"),
    ({"config_nam": "x"}, "'config_nam'.*'config_name'"),
  ],
)
def test_wrong_option_raises(options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load_source(saved(labelled(2), tmp_path), "train", **options)


def test_wrong_dataset_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"hf:/.*none"):
    load_source(f"hf:{tmp_path}/none", "train")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match=r"hf:/.*empty"):
    load_source(f"hf:{tmp_path}/empty", "train")
  name = saved(Dataset.from_dict({"text": ["a", "b"]}), tmp_path)
  with pytest.raises(ValueError, match="no images in the columns text"):
    load_source(name, "train")
