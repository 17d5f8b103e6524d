"""Fake data: the metadata, keys, dtypes and shapes of the datasets that they replace."""

import importlib

import numpy as np
import pytest
from PIL import Image

from vit_jax_zoo.data import fake_data as stand_in
from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.sources import demo as demo_source
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms


@pytest.mark.parametrize(
  ("name", "split", "count", "classes"),
  [
    ("tfds:imagenet2012", "train", 1_281_167, 1000),
    ("tfds:imagenet2012:5.1.0", "train[:99%]", 1_268_355, 1000),
    ("tfds:imagenet2012", "validation", 50_000, 1000),
    ("tfds:coco/2017", "train", 118_287, 91),
    ("segments:data/cityscapes", "val", 500, 19),
    ("pairs:/data/CUFED", "test", 126, None),
  ],
)
def test_known_dataset_metadata(name, split, count, classes):
  source = stand_in.load(name, split, data_dir=None)
  assert (len(source), source.info.num_classes, source.assumption) == (count, classes, "")


def test_missing_dataset_like_common_dataset():
  source = stand_in.load("coco:/nowhere", "val")
  assert source.assumption == "coco:/nowhere not found: assumed to be like coco/2017"
  assert len(source) == 5_000


def test_missing_dataset_of_unlisted_kind_raises(monkeypatch):
  monkeypatch.delitem(stand_in._COMMON, "coco")
  with pytest.raises(FileNotFoundError, match=r"^coco:/nowhere"):
    stand_in.load("coco:/nowhere", "train")


def test_existing_dataset_opened(tmp_path):
  for name in ("cat", "dog", "owl"):
    (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "train" / name / "1.png")
  source = stand_in.load(f"folder:{tmp_path}", "train")
  assert (len(source), source.info.num_classes, source.assumption) == (3, 3, "")


@pytest.mark.parametrize(
  ("demo", "name", "options"),
  [
    ("demo:digits", "tfds:cifar10", {}),
    ("demo:scenes", "tfds:coco/2017_panoptic", {"panoptic": True}),
    ("demo:stereo", "pairs:CUFED", {}),
  ],
)
def test_examples_like_real_source(demo, name, options, monkeypatch, tmp_path):
  """Same keys, dtypes and ranks."""
  if demo == "demo:scenes":  # drawing all 4,400 takes 20 s
    monkeypatch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_source, "COUNTS", {"train": 20, "test": 10})
  real, ours = (s("train", o) for s, o in ((lambda sp, o: load_source(demo, sp, **o)[0], options),
    (lambda sp, o: stand_in.load(name, sp, **o)[0], options)))  # fmt: skip
  assert ours.keys() == real.keys()
  for key, value in real.items():
    assert isinstance(ours[key], type(value)), key
    if isinstance(value, np.ndarray):
      assert (ours[key].dtype, ours[key].ndim) == (value.dtype, value.ndim)


@pytest.mark.parametrize(
  ("system", "variant", "shapes"),
  [
    ("vit", "b16_finetune", {"image": (384, 384, 3), "label": ()}),
    ("igpt", "xl_imagenet64", {"image": (64, 64, 3)}),
    ("ttsr", "cufed", {"low_res_image": (40, 40, 3), "ref_image": (160, 160, 3)}),
    ("fpt", "segmentation_cityscapes", {"image": (769, 769, 3), "label_map": (769, 769)}),
  ],
)
def test_training_shapes_fixed_size(system, variant, shapes):
  config = importlib.import_module(f"configs.{system}").get_config(variant)
  train = config.data.train
  source = stand_in.load(train.source, train.split)
  transforms = build_transforms(train.transforms)
  kinds = pipeline.training_shapes(source, transforms, batch_size=64, seed=0)
  assert [fraction for fraction, _ in kinds] == [1.0]
  found = {key: value.shape[1:] for key, value in kinds[0][1].items()}
  assert shapes.items() <= found.items()


def test_training_shapes_several_sizes():
  config = importlib.import_module("configs.detr").get_config("r50_panoptic")
  train = config.data.train
  source = stand_in.load(train.source, "train[:1%]", panoptic=True)
  kinds = pipeline.training_shapes(
    source, build_transforms(train.transforms), batch_size=8, seed=0, buckets=6
  )
  assert 2 <= len(kinds) <= 7
  assert sum(fraction for fraction, _ in kinds) == pytest.approx(1)
  for _, batch in kinds:
    height, width = batch["image"].shape[1:3]
    assert max(height, width) <= 1344  # 1333, to the next multiple of 32
    assert batch["boxes_cxcywh"].shape == (1, 100, 4)
