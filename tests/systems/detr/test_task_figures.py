"""Attention maps and panoptic segments in the figures of the detection task."""

import jax
import numpy as np
import pytest

from tests.systems.detr.tiny import TinyDetector
from vit_jax_zoo.systems.detr.model import Detr
from vit_jax_zoo.systems.detr.task import last_attention
from vit_jax_zoo.tasks import create_task


def test_last_layer_attention_is_returned_scanned_or_unrolled():
  rng = np.random.default_rng(0)
  maps = rng.uniform(size=(3, 2, 4, 5, 6)).astype(np.float32)  # layers, images, heads, queries, n
  memory = (np.zeros((2, 2, 3, 8)),)
  scanned = {"decoder": {"cross_attention": {"weights": (maps,)}}}
  unrolled = {f"decoder_{i}": {"cross_attention": {"weights": (maps[i],)}} for i in range(3)}
  expected = maps[-1].mean(axis=1).reshape(2, 5, 2, 3)
  for layers in (scanned, unrolled):
    got = last_attention({"transformer": layers, "memory": memory})
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_predictions_include_attention_only_for_figures():
  backbone = {"blocks": (1, 1, 1, 1), "widths": (2, 2, 2, 2), "stem_width": 2}
  model = Detr(3, 5, 8, 1, 2, 2, 8, backbone=backbone)
  batch = {"image": np.zeros((2, 64, 96, 3), np.uint8)}
  variables = jax.eval_shape(
    create_task("detection", model, num_classes=3).init, jax.random.key(0), batch
  )
  for draw in (True, False):
    task = create_task("detection", model, num_classes=3, draw_attention=draw)
    predictions = jax.eval_shape(task.predict, variables, batch)
    assert ("attention" in predictions) == draw
    if draw:
      assert predictions["attention"].shape == (2, 5, 2, 3)


def test_segments_above_threshold_are_drawn_and_scored():
  task = create_task(
    "detection", TinyDetector(mask_head=True), num_classes=4, stuff_from=2, segment_threshold=0.6
  )
  mask_logits = np.full((1, 6, 4, 4), -9.0, np.float32)
  mask_logits[0, 0, :2], mask_logits[0, 1, 2:], mask_logits[0, 2] = 9.0, 9.0, 99.0
  batch = {
    "image": np.zeros((1, 8, 8, 3), np.uint8),
    "image_size": np.array([[8, 8]]),
    "boxes_cxcywh": np.array([[[0.5, 0.25, 1, 0.5], [0.5, 0.75, 1, 0.5]]], np.float32),
    "labels": np.array([[1, 3]]),
    "is_target": np.ones((1, 2), bool),
    "segment_map": np.repeat(np.array([0, 1]), 4)[None, :, None].repeat(8, axis=2),
  }
  predictions = {
    "scores": np.array([[0.9, 0.7, 0.5, 0.1, 0.1, 0.1]]),
    "labels": np.array([[1, 3, 0, 0, 0, 0]]),
    "is_object": np.array([[True, True, True, False, False, False]]),
    "boxes_xyxy": np.zeros((1, 6, 4), np.float32),
    "mask_logits": mask_logits,
  }
  figure = task.figures(batch, predictions)["segments"]
  assert [ax.get_title(loc="left") for ax in figure.axes] == ["truth: 2", "predicted: 2"]
  evaluator = task.evaluator()
  evaluator.add(batch, predictions)
  assert evaluator.result()["pq"] == pytest.approx(1.0)
  with pytest.raises(ValueError, match="segment_threshold"):
    create_task("detection", TinyDetector(), num_classes=4, segment_threshold=2.0)
