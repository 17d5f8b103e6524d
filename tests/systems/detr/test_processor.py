"""What transformers' DetrImageProcessor does before and after the model, done by ours."""

import dataclasses

import jax
import numpy as np

from tests.systems.detr.tiny import Echo
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.weights.detection_layouts import PREPROCESS


def test_pictures_come_to_the_same_sizes(load_golden):
  """All but one of a ratio of 8: transformers does not round the shorter side in between.

  The paper's code does, and training here as well (tests/data/test_geometry.py).
  """
  _, inputs, outputs = load_golden("detr_hf_fn_a")
  different = {}
  for size, expected in zip(inputs["size_hw_in"], outputs["size_hw_800_1333"], strict=True):
    got = PREPROCESS.resize(np.zeros((*size, 3), np.uint8)).shape[:2]
    if got != tuple(expected):
      different[tuple(map(int, size))] = (got, tuple(map(int, expected)))
  assert different == {(400, 50): ((1336, 167), (1333, 167))}


def test_pictures_get_the_same_values(load_golden):
  config, inputs, outputs = load_golden("detr_hf_fn_a")
  shortest, longest = config["size"]["shortest_edge"], config["size"]["longest_edge"]
  preprocess = dataclasses.replace(PREPROCESS, image_size=(shortest, shortest), max_side=longest)
  for row, mask in enumerate(outputs["pixel_mask"].astype(bool)):
    got = preprocess([inputs[f"image_{row}"]])[0]
    height, width = mask.any(axis=1).sum(), mask.any(axis=0).sum()
    assert got.shape == (height, width, 3)
    expected = np.moveaxis(outputs["pixel_values"][row], 0, -1)[:height, :width]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_same_objects_are_found(load_golden):
  config, inputs, outputs = load_golden("detr_hf_fn_a")
  predictions = {"logits": inputs["logits"], "boxes_cxcywh": inputs["pred_boxes"]}
  task = create_task("detection", Echo(predictions), num_classes=config["num_labels"])
  batch = {
    "image": np.zeros((2, 8, 8, 3), np.uint8),
    "original_size": np.array(config["target_sizes"], np.int32),
  }
  found = jax.device_get(jax.jit(task.predict)({}, batch))
  for row in range(2):
    sure = found["scores"][row] > config["thresholds"]["det"]
    np.testing.assert_allclose(found["scores"][row][sure], outputs[f"det_{row}/scores"], atol=1e-6)
    np.testing.assert_array_equal(found["labels"][row][sure], outputs[f"det_{row}/labels"])
    np.testing.assert_allclose(
      found["boxes_xyxy"][row][sure], outputs[f"det_{row}/boxes"], rtol=1e-5, atol=1e-4
    )
