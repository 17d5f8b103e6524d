"""Preprocessing of Hugging Face's DETR folders and detections, against transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.systems.detr.tiny import Echo
from vit_jax_zoo.systems.detr import weights_hf
from vit_jax_zoo.systems.detr.weights_hf import read_preprocess
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.weights import WeightsError
from vit_jax_zoo.weights.preprocess import DETECTION

SIZES = (
  (480, 640), (640, 480), (427, 640), (333, 500), (500, 333), (64, 64), (100, 200), (200, 100),
  (97, 301), (301, 97), (800, 1333), (1333, 800), (800, 800), (5, 9), (31, 57), (120, 800),
  (1000, 750), (50, 400), (400, 50), (612, 611),
)  # fmt: skip

PROCESSORS = {
  "default": {},
  "shortest_edge": {"size": {"shortest_edge": 60, "longest_edge": 100}},
  "max_height": {
    "size": {"max_height": 96, "max_width": 96},
    "pad_size": {"height": 96, "width": 96},
  },
  "height": {"size": {"height": 48, "width": 80}, "resample": 3},
  "integer": {"size": 64, "max_size": 90, "resample": 0},
  "no_resize": {"do_resize": False},
  "no_rescale": {"size": {"height": 40, "width": 40}, "do_rescale": False},
  "no_normalize": {"size": {"height": 40, "width": 40}, "do_normalize": False, "resample": 1},
  "raw": {"size": {"height": 9, "width": 8}, "do_normalize": False, "do_rescale": False},
  "custom_statistics": {
    "size": {"shortest_edge": 30, "longest_edge": 50},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "rescale_factor": 0.01,
  },
}


def random_images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_preprocess_equals_transformers(name):
  """Compares with the Pillow backend; the torchvision backend rounds some pixels differently."""
  from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

  ours, theirs = read_preprocess(PROCESSORS[name], name), DetrImageProcessorPil(**PROCESSORS[name])
  for image in random_images():
    expected = theirs(image, input_data_format="channels_last", return_tensors="np")
    np.testing.assert_array_equal(ours.pixel_mask([image]), expected["pixel_mask"].astype(bool))
    got = np.moveaxis(ours([image]), -1, 1)
    scale = max(1.0, float(np.abs(expected["pixel_values"]).max()))
    np.testing.assert_allclose(got, expected["pixel_values"], atol=1e-5 * scale)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_preprocess_sizes_equal_torchvision_backend(name):
  import transformers

  ours = read_preprocess(PROCESSORS[name], name)
  theirs = transformers.DetrImageProcessor(**PROCESSORS[name])
  for image in random_images():
    expected = theirs(image, input_data_format="channels_last", return_tensors="pt")[
      "pixel_mask"
    ].numpy()
    np.testing.assert_array_equal(ours.pixel_mask([image]), expected.astype(bool))


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_processor_round_trip_is_exact(name):
  preprocess = read_preprocess(PROCESSORS[name], name)
  written = json.loads(json.dumps(weights_hf._processor_of(preprocess, masks=False)))
  again = read_preprocess(written, name)
  if preprocess.fit == "none":
    again = dataclasses.replace(again, image_size=preprocess.image_size)
  for field in dataclasses.fields(preprocess):
    got, expected = getattr(again, field.name), getattr(preprocess, field.name)
    if field.name in ("mean", "std"):
      np.testing.assert_allclose(got, expected, rtol=1e-12)
    else:
      assert got == expected, field.name


def test_max_height_and_pad_size_are_applied():
  preprocess = read_preprocess(PROCESSORS["max_height"], "file")
  image = np.full((200, 100, 3), 255, np.uint8)
  assert preprocess.resize(image).shape == (96, 48, 3)
  padded = preprocess([image])
  assert padded.shape == (1, 96, 96, 3)
  assert (padded[:, :, 48:] == 0).all()
  assert preprocess.pixel_mask([image]).sum() == 96 * 48


@pytest.mark.parametrize(
  ("processor", "field"),
  [
    ({"size": {"width": 3}}, "size"),
    ({"size": 640.0}, "size"),
    ({"resample": 9}, "resample"),
    ({"pad_size": {"shortest_edge": 3}}, "pad_size"),
  ],
)
def test_unknown_processor_field_raises(processor, field):
  with pytest.raises(WeightsError, match=rf"folder/preprocessor_config\.json: {field}"):
    read_preprocess(processor, "folder/preprocessor_config.json")


def test_other_class_logged(caplog):
  read_preprocess({"image_processor_type": "DetrImageProcessorFast"}, "file")
  assert not caplog.records
  read_preprocess({"image_processor_type": "MaskFormerImageProcessor"}, "file")
  assert "MaskFormerImageProcessor is read as DetrImageProcessor" in caplog.text


def test_size_as_list_and_pad_size_as_number():
  preprocess = read_preprocess({"size": [480, 640], "pad_size": 700}, "file")
  assert preprocess.resized_size(100, 100) == (480, 640)
  assert preprocess.pad_size == (700, 700)


def test_resized_size_equals_transformers_golden(load_golden):
  _, inputs, outputs = load_golden("detr_hf_fn_a")
  preprocess = read_preprocess({}, "file")
  for size, expected in zip(inputs["size_hw_in"], outputs["size_hw_800_1333"], strict=True):
    assert preprocess.resized_size(*map(int, size)) == tuple(expected)
  # The official code rounds the shorter side first (tests/data/transforms/test_geometry.py).
  assert DETECTION.resized_size(400, 50) == (1336, 167)
  assert preprocess.resized_size(400, 50) == (1333, 167)


def test_pixel_values_equal_transformers_golden(load_golden):
  config, inputs, outputs = load_golden("detr_hf_fn_a")
  preprocess = read_preprocess({"size": config["size"]}, "file")
  for row, mask in enumerate(outputs["pixel_mask"].astype(bool)):
    got = preprocess([inputs[f"image_{row}"]])[0]
    height, width = mask.any(axis=1).sum(), mask.any(axis=0).sum()
    assert got.shape == (height, width, 3)
    expected = np.moveaxis(outputs["pixel_values"][row], 0, -1)[:height, :width]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_detections_equal_transformers_golden(load_golden):
  config, inputs, outputs = load_golden("detr_hf_fn_a")
  predictions = {"logits": inputs["logits"], "boxes_cxcywh": inputs["pred_boxes"]}
  task = create_task("detection", Echo(predictions), num_classes=config["num_labels"])
  batch = {
    "image": np.zeros((2, 8, 8, 3), np.uint8),
    "original_size": np.array(config["target_sizes"], np.int32),
  }
  detections = jax.device_get(jax.jit(task.predict)({}, batch))
  for row in range(2):
    keep = detections["scores"][row] > config["thresholds"]["det"]
    np.testing.assert_allclose(
      detections["scores"][row][keep], outputs[f"det_{row}/scores"], atol=1e-6
    )
    np.testing.assert_array_equal(detections["labels"][row][keep], outputs[f"det_{row}/labels"])
    np.testing.assert_allclose(
      detections["boxes_xyxy"][row][keep], outputs[f"det_{row}/boxes"], rtol=1e-5, atol=1e-4
    )
