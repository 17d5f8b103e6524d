"""Exports of R-CNN as orbax and StableHLO."""

import dataclasses
import json

import jax
import numpy as np

from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.inference import create_predictor
from vit_jax_zoo.inference.base import Options
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.weights import Pretrained
from vit_jax_zoo.weights.preprocess import DETECTION


def test_exports_detect_the_same(tmp_path):
  backbone = {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4}
  model = RCNN(num_classes=4, backbone=backbone)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(float(x.ndim == 1), 0.05, x.shape).astype(np.float32), shapes
  )
  preprocess = dataclasses.replace(DETECTION, image_size=(64, 64), max_side=96)
  config = {"num_classes": 4, "image_size": (64, 64)}
  made = Pretrained(model, variables, preprocess, config, "instance_detection", {})
  for form in ("orbax", "stablehlo"):
    export.write(made, form, str(tmp_path / form))
  assert load_pretrained(str(tmp_path / "orbax")).preprocess == preprocess

  image = rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)
  resized = preprocess.resize(image)
  predictor = create_predictor(load(str(tmp_path / "orbax")), Options(threshold=0.0))
  expected = predictor(image).record["detections"]
  notes = json.loads((tmp_path / "stablehlo/model.json").read_text())
  images = np.zeros((2, *map(int, notes["images"][1:3]), 3), np.float32)
  images[:, : resized.shape[0], : resized.shape[1]] = resized
  program = jax.export.deserialize(bytearray((tmp_path / "stablehlo/model.stablehlo").read_bytes()))
  found = program.call(images, np.array([resized.shape[:2]] * 2, np.int32))
  scores = np.asarray(found["scores"][1])[np.asarray(found["is_object"][1])]
  np.testing.assert_allclose(np.sort(scores)[::-1], [d["score"] for d in expected], atol=1e-4)
