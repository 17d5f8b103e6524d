"""Exports of R-CNN as orbax and StableHLO."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.inference.load import task_of
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.weights import Pretrained
from vit_jax_zoo.weights.preprocess import DETECTION


@pytest.mark.long
def test_exports_detect_same_objects(tmp_path):
  backbone = {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4}
  limits = {"pre_nms_top_n": 40, "post_nms_top_n": 12}
  model = RCNN(
    num_classes=4, backbone=backbone, width=8, proposals=limits, pool_size=3, mask_pool_size=3,
    box_head={"width": 16}, mask_head={"width": 8, "num_convs": 1},
  )  # fmt: skip
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(float(x.ndim == 1), 0.05, x.shape).astype(np.float32), shapes
  )
  preprocess = dataclasses.replace(DETECTION, image_size=(64, 96), fit="squash", max_side=None)
  config = {"num_classes": 4, "image_size": (64, 96)}
  pretrained = Pretrained(model, variables, preprocess, config, "instance_detection", {})
  for form in ("orbax", "stablehlo"):
    export.write(pretrained, form, str(tmp_path / form))
  assert load_pretrained(str(tmp_path / "orbax")).preprocess == preprocess

  task = task_of(load_pretrained(str(tmp_path / "orbax")))
  assert task.num_classes == 4
  notes = json.loads((tmp_path / "stablehlo/model.json").read_text())
  assert notes["images"][1:3] == ["64", "96"]
  assert any("the amount of padding changes all outputs" in step for step in notes["steps"])
  batch = {
    "image": rng.uniform(0, 255, (2, 64, 96, 3)).astype(np.float32),
    "image_size": np.array([[64, 96], [40, 50]], np.int32),
  }
  program = jax.export.deserialize(bytearray((tmp_path / "stablehlo/model.stablehlo").read_bytes()))
  outputs = program.call(batch["image"], batch["image_size"])
  expected = jax.jit(task.predict)(variables, batch)
  for key, value in expected.items():
    np.testing.assert_allclose(outputs[key], value, atol=1e-3, err_msg=key)
