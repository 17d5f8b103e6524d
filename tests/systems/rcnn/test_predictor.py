"""The R-CNN predictor on images of any size."""

import numpy as np
import pytest
from faster_coco_eval.core import mask as run_lengths

from tests.systems.rcnn.test_model import HEADS
from tests.variables import random_variables
from vit_jax_zoo.inference.base import Options, Trained, create_predictor
from vit_jax_zoo.systems.rcnn.masks import paste_masks
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.tasks import create_task

SMALL = {
  "num_classes": 2,
  "backbone": {"blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4), "stem_width": 8},
  "levels": ("c2",),
  "extra_levels": 0,
  "width": 8,
  "anchor_sizes": (16,),
  "proposals": {"pre_nms_top_n": 20, "post_nms_top_n": 6},
  "pool_size": 3,
  "mask_pool_size": 3,
  "box_head": {"width": 8},
  "mask_head": {"width": 8, "num_convs": 1},
}


@pytest.fixture
def paste_conventions(monkeypatch):
  """Records the convention of each call of `paste_masks`."""
  conventions = []

  def paste(*args, **fields):
    conventions.append(fields["convention"])
    return paste_masks(*args, **fields)

  monkeypatch.setattr("vit_jax_zoo.systems.rcnn.predictor.paste_masks", paste)
  return conventions


def test_prediction_has_objects_and_figures(paste_conventions):
  task = create_task(
    "instance_detection", RCNN(**SMALL, convention="detectron"), num_classes=2,
    class_names=("cup", "saucer"), box_detections_per_img=4, box_score_thresh=0.0,
  )  # fmt: skip
  half = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
  variables = random_variables(task.init, half, small=HEADS)
  trained = Trained(
    "test", task, variables, lambda image: {"image": image[::2, ::2]}, None, "mask_rcnn"
  )
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  predictor = create_predictor(trained, Options(threshold=0.0))
  prediction = predictor(image)
  objects = prediction.record["objects"]
  assert 1 <= len(objects) <= 4
  for entry in objects:
    assert entry["name"] == ("cup", "saucer")[entry["label"]]
    left, top, right, bottom = entry["box"]
    assert 0 <= left < right <= 64 >= bottom > top >= 0
    assert run_lengths.decode(entry["mask"]).shape == (64, 64)
  for entry, known in zip(prediction.objects, objects, strict=True):
    assert (entry["category_id"], entry["name"]) == (known["label"], known["name"])
    left, top, width, height = entry["bbox"]
    assert [left, top, left + width, top + height] == pytest.approx(known["box"])
    assert entry["area"] == run_lengths.decode(entry["segmentation"]).sum()
  scores = [entry["score"] for entry in objects]
  assert scores == sorted(scores, reverse=True)
  assert max(entry["box"][2] for entry in objects) > 32  # in the pixels of the original image
  assert set(prediction.pictures) == {"", "masks"}
  assert paste_conventions == [task.evaluator().paste_convention] == ["detectron"]
  assert prediction.masks.shape == (len(objects), 64, 64)
  predictor.batch_size = 2
  _, again = predictor([image[::-1].copy(), image])
  assert again.labels == prediction.labels
  np.testing.assert_allclose(again.scores, prediction.scores, rtol=1e-4)
  np.testing.assert_allclose(again.boxes, prediction.boxes, atol=1e-2)
  certain = create_predictor(trained, Options(threshold=1.0))(image)
  assert certain.record["objects"] == []


def test_explain_without_attention_neck_raises():
  task = create_task("instance_detection", RCNN(**SMALL), num_classes=2)
  trained = Trained("test", task, {}, lambda image: {"image": image}, None, "faster_rcnn")
  with pytest.raises(ValueError, match="--explain: the model's neck"):
    create_predictor(trained, Options(explain=True))
