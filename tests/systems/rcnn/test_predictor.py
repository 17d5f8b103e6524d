"""A two-stage detector on a user's picture of any size."""

import dataclasses

import jax
import numpy as np
import pytest
from faster_coco_eval.core import mask as run_lengths

from vit_jax_zoo.inference import create_predictor
from vit_jax_zoo.inference.base import Options, Trained
from vit_jax_zoo.ops.mask_paste import paste_masks
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.tasks import create_task

SMALL = {
  "num_classes": 2,
  "backbone": {"blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4), "stem_width": 8},
  "levels": ("c2",),
  "extra_levels": 0,
  "width": 8,
  "anchor_sizes": (16,),
  "proposals": {"before_nms": 20, "after_nms": 6},
  "pool_size": 3,
  "mask_pool_size": 3,
  "box_head": {"width": 8},
  "mask_head": {"width": 8, "num_convs": 1},
}


@pytest.fixture
def pasted(monkeypatch):
  """By which convention masks were pasted."""
  seen = []

  def paste(*args, **fields):
    seen.append(fields["convention"])
    return paste_masks(*args, **fields)

  monkeypatch.setattr("vit_jax_zoo.systems.rcnn.predictor.paste_masks", paste)
  return seen


def test_objects_names_masks_and_pictures(pasted):
  task = create_task(
    "instance_detection", RCNN(**SMALL, convention="detectron"), num_classes=2,
    class_names=("cup", "saucer"), max_detections=4, least_score=0.0,
  )  # fmt: skip
  half = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
  variables = jax.tree.map(np.asarray, jax.jit(task.init)(jax.random.key(0), half))
  trained = Trained(
    "test", task, variables, lambda image: {"image": image[::2, ::2]}, None, "mask_rcnn"
  )
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  found = create_predictor(trained, Options(threshold=0.0))(image)
  objects = found.record["objects"]
  assert 1 <= len(objects) <= 4
  for entry in objects:
    assert entry["name"] == ("cup", "saucer")[entry["label"]]
    left, top, right, bottom = entry["box"]
    assert 0 <= left < right <= 64 >= bottom > top >= 0
    assert run_lengths.decode(entry["mask"]).shape == (64, 64)
  for entry, known in zip(found.objects, objects, strict=True):
    assert (entry["category_id"], entry["name"]) == (known["label"], known["name"])
    left, top, width, height = entry["bbox"]
    assert [left, top, left + width, top + height] == pytest.approx(known["box"])
    assert entry["area"] == run_lengths.decode(entry["segmentation"]).sum()
  scores = [entry["score"] for entry in objects]
  assert scores == sorted(scores, reverse=True)
  assert max(entry["box"][2] for entry in objects) > 32  # of the picture, not of what was seen
  assert set(found.pictures) == {"", "masks"}
  assert pasted == [task.evaluator().paste_convention] == ["detectron"]
  certain = create_predictor(trained, Options(threshold=1.0))(image)
  assert certain.record["objects"] == []


@pytest.mark.parametrize("flavor", ["paper", "official"])
def test_explain_draws_where_the_levels_look(flavor):
  """By hand: rows of the attention maps of the levels, of the query in the picture's middle."""
  fields = {"levels": ("c2", "c3"), "anchor_sizes": (16, 16), "mask_head": None, "width": 32}
  neck = {"flavor": flavor}
  model = RCNN(**{**SMALL, **fields, "neck": "fpt", "neck_fields": neck})
  task = create_task("instance_detection", model, num_classes=2)
  image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
  shapes = jax.eval_shape(task.init, jax.random.key(0), {"image": image[None]})
  rng = np.random.default_rng(1)

  def leaf(path, shape):
    value = {"var": 1.0, "scale": 1.0, "mean": 0.0}.get(path[-1].key)
    if value is None:
      return rng.normal(0, 0.1, shape.shape).astype(np.float32)
    return np.full(shape.shape, value, np.float32)

  variables = jax.tree_util.tree_map_with_path(leaf, shapes)
  trained = Trained("test", task, variables, lambda image: {"image": image}, None, "faster_rcnn")
  found = create_predictor(trained, Options(threshold=1.0, explain=True))(image)
  assert found.record["objects"] == []
  figure = found.pictures["levels"]
  maps = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[1:]]
  pooled = flavor == "official"
  sizes = [(3, 4), (2, 2)] if pooled else [(6, 8), (3, 4), (3, 4)]
  assert [x.shape for x in maps] == sizes
  for looked in maps:
    assert looked.sum() == pytest.approx(1, abs=1e-5)
    assert looked.min() >= 0
  titles = [ax.get_title() for ax in figure.axes]
  assert titles[:3] == ["from the ring", "p2: 6x8", "p3: 3x4"]
  without = RCNN(**{**SMALL, **fields, "neck": "fpn"})
  other = create_task("instance_detection", without, num_classes=2)
  with pytest.raises(ValueError, match="this model has no FPT"):
    create_predictor(dataclasses.replace(trained, task=other), Options(explain=True))
