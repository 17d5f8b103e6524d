"""Two steps of the fine-tuning recipes on tables, Hugging Face datasets and WebDataset shards."""

import functools

import datasets
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.conftest import system_module
from vit_jax_zoo import trainer
from vit_jax_zoo.builder import build
from vit_jax_zoo.config import load

system_module("vit")


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  monkeypatch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))


def photo(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
  return Image.fromarray(pixels)


def train_classifier(source, workdir, *fields, steps=2):
  """Trains a small ViT on a source; returns the scores."""
  text = ",".join(("model=vit_ti16", f"source={source}", "image_size=16", "dtype=float32", *fields))
  config = load(f"configs/finetune.py:{text}")
  config.update(num_steps=steps, num_epochs=None, batch_size=2, init_from=None, explain=False)
  config.model.update(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=8)
  return trainer.run(config, epath.Path(workdir)).scores


def test_train_on_table_of_several_labels(tmp_path):
  rows = ["path,label"]
  for i in range(30):
    photo(i).save(tmp_path / f"{i}.png")
    rows.append(f"{i}.png,{('', 'cat', 'dog', 'cat|dog')[i % 4]}")
  (tmp_path / "labels.csv").write_text("\n".join(rows))
  scores = train_classifier(f"csv:{tmp_path}/labels.csv", tmp_path / "run", "multi_label=true")
  assert scores["test/loss"] > 0
  assert {"val/loss", "test/accuracy/dog"} <= scores.keys()


def hugging_face(root, features, **columns):
  """Saves 12 images with further columns; returns the source's name."""
  features = datasets.Features({"image": datasets.Image(), **features})
  rows = {"image": [photo(i) for i in range(12)], **columns}
  datasets.Dataset.from_dict(rows, features=features).save_to_disk(root / "data")
  return f"hf:{root / 'data'}"


def data_of(recipe):
  """Returns the class names of a recipe's task, and the first training example."""
  experiment = build(load(recipe), devices=jax.devices()[:1])
  return experiment.task.class_names, experiment.train_source[0]


def test_objects_of_hugging_face_for_detr(tmp_path):
  system_module("detr")
  kind = {
    "bbox": datasets.List(datasets.List(datasets.Value("int64"))),
    "category": datasets.List(datasets.ClassLabel(names=["nut", "bolt"])),
  }
  objects = [{"bbox": [[2, 3, 10, 8]], "category": [i % 2]} for i in range(12)]
  name = hugging_face(tmp_path, {"objects": kind}, objects=objects)
  names, example = data_of(f"configs/detr.py:r50_finetune,source={name}")
  assert names == ("nut", "bolt")
  np.testing.assert_array_equal(example["boxes_xyxy"], [[2, 3, 12, 11]])


def test_label_maps_of_hugging_face_for_fpt(tmp_path):
  system_module("fpt")
  maps = [Image.fromarray(np.full((20, 24), i % 2, np.uint8)) for i in range(12)]
  name = hugging_face(tmp_path, {"mask": datasets.Image()}, mask=maps)
  recipe = f"configs/fpt.py:segmentation_finetune,source={name},crop=33"
  with pytest.raises(ValueError, match="num_classes"):
    data_of(recipe)
  (tmp_path / "classes.txt").write_text("road\nroof\n")
  names, example = data_of(f"{recipe},class_names={tmp_path}/classes.txt")
  assert names == ("road", "roof")
  assert {"image", "label_map", "image_id"} == example.keys()
