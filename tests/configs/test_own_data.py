"""Fine-tuning recipes: a few steps on COCO files and label maps with custom classes."""

import functools
import json

import jax
import numpy as np
import pytest
from absl import logging
from etils import epath
from PIL import Image

from tests.conftest import system_module
from vit_jax_zoo import trainer
from vit_jax_zoo.builder import build
from vit_jax_zoo.config import load
from vit_jax_zoo.training.lr_scaling import advise
from vit_jax_zoo.training.train_step import abstract_batch_of

system_module("detr")
system_module("fpt")

BACKBONE = {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 8}
LOADER = {"num_workers": 0, "buckets": 1, "on_corrupt": "skip"}


def photo(rng):
  return Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))


def write_coco(root, **sizes):
  """Writes images with one rectangle each, of the classes "bolt" (2) and "nut" (5)."""
  rng = np.random.default_rng(0)
  (root / "annotations").mkdir()
  for split, size in sizes.items():
    (root / split).mkdir()
    images, annotations = [], []
    for i in range(1, size + 1):
      photo(rng).save(root / split / f"{i}.png")
      images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 48})
      annotations.append({
        "id": i, "image_id": i, "category_id": (2, 5)[i % 2], "bbox": [8, 8, 24, 20],
        "area": 480, "iscrowd": 0, "segmentation": [[8, 8, 32, 8, 32, 28, 8, 28]],
      })  # fmt: skip
    categories = [{"id": 2, "name": "bolt"}, {"id": 5, "name": "nut"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
  return root


def write_label_maps(root, values, **sizes):
  rng = np.random.default_rng(0)
  for split, size in sizes.items():
    for folder in ("images", "annotations"):
      (root / folder / split).mkdir(parents=True)
    for i in range(size):
      photo(rng).save(root / "images" / split / f"{i}.png")
      labels = rng.choice(np.array(values, np.uint8), (40, 48))
      Image.fromarray(labels).save(root / "annotations" / split / f"{i}.png")
  (root / "classes.txt").write_text("road\nroof\n")
  return root


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  monkeypatch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))


def small_experiment(config, **model):
  """Sets 2 steps of a small model with random weights; returns the experiment."""
  config.update(num_steps=2, num_epochs=None, batch_size=2, eval_batch_size=2, init_from=None)
  config.data.loader = LOADER
  config.model.update(model)
  config.task.backbone_file = None
  experiment = trainer.build(config)
  assert [name for name in experiment.task.class_names if name != "N/A"] in (
    ["bolt", "nut"], ["road", "roof"],
  )  # fmt: skip
  return experiment


def shrink(transforms):
  """Sets the images' shorter side to 64 pixels."""
  for transform in transforms:
    if transform["name"] in ("random_scale_crop", "resize_shorter"):
      transform["shorter"] = (64,)
    if transform["name"] == "random_scale_crop":
      transform["crop_probability"] = 0.0


def masks_config(system, root):
  """Returns the config of a system for objects with masks, and the fields of a small model."""
  text = f"source=coco:{root},masks=true"
  if system == "detr":
    config = load(f"configs/detr.py:r50_finetune,{text}")
    small = dict(width=16, encoder_depth=1, decoder_depth=2, mlp_dim=16, num_queries=5)
    small["remat"] = "none"
  else:
    config = load(f"configs/fpt.py:finetune,{text},neck=fpn,dtype=float32")
    small = dict(
      width=8, proposals={"pre_nms_top_n": (20, 20), "post_nms_top_n": (10, 10)},
      box_head={"width": 16},
    )  # fmt: skip
    small["mask_head"] = {"num_convs": 1, "width": 8}
  for split in (config.data.train, config.data.eval.val):
    shrink(split.transforms)
  return config, small | {"backbone": BACKBONE}


@pytest.mark.long
@pytest.mark.parametrize("system", ["detr", "fpt"])
def test_trace_steps_with_masks(system, tmp_path):
  """Traces the training and evaluation steps; compiling them takes a minute."""
  config, small = masks_config(system, write_coco(tmp_path, train=5, val=3))
  experiment = small_experiment(config, **small)
  with experiment.train_batches() as batches, jax.set_mesh(experiment.mesh):
    program = experiment.program(next(batches))
    _, metrics = jax.eval_shape(program.train_step, program.abstract_state, program.abstract_batch)
    assert {"loss", "mask_loss"} <= metrics.keys()
    shapes = abstract_batch_of(next(iter(experiment.eval_batches("val"))), 2)
    assert jax.eval_shape(experiment.task.predict, program.abstract_variables, shapes)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["detr", "fpt"])
def test_train_with_masks(system, tmp_path):
  config, small = masks_config(system, write_coco(tmp_path, train=5, val=3))
  small_experiment(config, **small)
  scores = trainer.run(config, epath.Path(tmp_path / "run")).scores
  assert {"val/mask_ap", "val/box_ap", "best/val/box_ap"} <= scores.keys()
  assert any("nut" in name for name in scores)


@pytest.mark.long
def test_train_on_label_maps(tmp_path):
  root = write_label_maps(tmp_path, (0, 255), train=5, val=3)
  fields = f"values=0+255,class_names={root}/classes.txt"
  config = load(
    f"configs/fpt.py:segmentation_finetune,source=segmentation:{root},{fields},neck=ufp,crop=32,"
    "dtype=float32"
  )
  small_experiment(config, backbone=BACKBONE, width=8, kernel_sizes=(1, 3), auxiliary_head=False)
  scores = trainer.run(config, epath.Path(tmp_path / "run")).scores
  assert 0 <= scores["val/miou"] <= 1
  assert {"val/iou/road", "val/iou/roof"} <= scores.keys()


@pytest.mark.parametrize(("count", "steps"), [(20, 250), (46, 575), (500, 6250)])
@pytest.mark.parametrize(
  ("system", "variant"), [("detr", "r50_finetune"), ("fpt", "finetune")], ids=["detr", "fpt"]
)
def test_schedule_of_small_dataset(system, variant, count, steps, tmp_path):
  root = write_coco(tmp_path, train=count, val=3)
  config = load(f"configs/{system}.py:{variant},source=coco:{root}")
  experiment = build(config.copy_and_resolve_references(), devices=jax.devices()[:1])
  assert experiment.num_steps == steps
  assert round(config.eval_every * steps) >= 10
  warmup = config.optimizer.schedule.warmup_steps * steps
  assert 10 <= warmup <= steps / 10
  assert config.log_every <= steps / 20
  assert advise(config.to_dict()) == []


@pytest.mark.parametrize(("part", "section"), [("train", "train"), ("val", "eval.val")])
def test_no_objects_raise(part, section, tmp_path):
  root = write_coco(tmp_path, train=5, val=3)
  (file,) = root.rglob(f"*{part}*.json")
  content = json.loads(file.read_text())
  for annotation in content["annotations"]:
    annotation["iscrowd"] = 1
  file.write_text(json.dumps(content))
  config = load(f"configs/detr.py:r50_finetune,source=coco:{root}")
  message = rf"data\.{section}: .*no annotated objects, or only crowds"
  with pytest.raises(ValueError, match=message):
    build(config.copy_and_resolve_references(), devices=jax.devices()[:1])


def test_learning_rate_scaled_with_batch_size():
  for system, variant in (("detr", "r50_finetune"), ("fpt", "finetune")):
    few, many = (load(f"configs/{system}.py:{variant},batch_size={size}") for size in (4, 16))
    assert many.optimizer.learning_rate > few.optimizer.learning_rate
    assert [level for level, _ in advise(many.to_dict())] == [logging.INFO]


def test_label_map_classes(tmp_path):
  root = write_label_maps(tmp_path, (0, 1), train=8, val=3)
  config = load(f"configs/fpt.py:segmentation_finetune,source=segmentation:{root}")
  assert build(config, devices=jax.devices()[:1]).task.class_names == ("road", "roof")
  (root / "classes.txt").unlink()
  with pytest.raises(FileNotFoundError, match=r"class_names.*classes\.txt"):
    build(config, devices=jax.devices()[:1])
  with pytest.raises(ValueError, match="values='a-3'"):
    load("configs/fpt.py:segmentation_finetune,source=segmentation:/mine,values=a-3")
  config = load("configs/fpt.py:segmentation_finetune,source=segmentation:/mine,values=1-3+9")
  assert config.model.num_classes == config.task.num_classes == 4
  assert config.data.eval.val.transforms[0]["classes"] == (1, 2, 3, 9)


def test_init_from_of_mask_recipes():
  assert load("configs/detr.py:r50_finetune").init_from == "detr_r50_coco"
  assert load("configs/detr.py:r50_finetune,masks=true").init_from == "detr_r50_panoptic_coco"
  assert load("configs/detr.py:r101_dc5_finetune,masks=true").init_from == "detr_r101_dc5_coco"
