"""ONNX exports in ONNX Runtime against our outputs, for several batch sizes."""

import json

import jax
import numpy as np
import pytest

from tests.inference.random_models import MODELS, random_model
from vit_jax_zoo import export
from vit_jax_zoo.inference.programs import by_name, make_program

pytest.importorskip("jax2onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the converter


def run(folder, inputs):
  session = onnxruntime.InferenceSession(folder / "model.onnx")
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.mark.parametrize("system", MODELS)
def test_outputs_equal_ours(system, tmp_path):
  made = random_model(system)
  export.write(made, "onnx", str(tmp_path))
  notes = json.loads((tmp_path / "model.json").read_text())
  function, arguments, _ = make_program(made, one_by_one=False)
  height, width = made.config["image_size"]
  rng = np.random.default_rng(1)
  for batch in (1, 3):
    inputs = {"images": rng.uniform(0, 255, (batch, height, width, 3)).astype(np.float32)}
    if "image_size" in arguments:
      inputs["image_size"] = np.array([[64, 96], [40, 96], [64, 50]], np.int32)[:batch]
    found = run(tmp_path, inputs)
    expected = by_name(jax.jit(function)(*inputs.values()))
    assert found.keys() == expected.keys() == notes["outputs"].keys()
    for key, value in expected.items():
      atol = 1e-2 if key == "boxes_xyxy" else 1e-4  # boxes are in pixels
      np.testing.assert_allclose(found[key], value, atol=atol, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize(
  "fields",
  [
    {"interpolation": "bicubic", "fit": "crop", "crop_pct": 0.9},
    {"interpolation": "opencv", "fit": "squash"},
  ],
  ids=["bicubic", "opencv"],
)
def test_preprocessing_within_program(fields, tmp_path):
  """uint8 images of any size; the resized levels are those of the model's own preprocessing.

  OpenCV's filter, that of the demos, also slices symbolic axes.
  """
  made = random_model("vit", **fields)
  export.write(made, "onnx", str(tmp_path), with_preprocessing=True)
  for height, width in ((100, 64), (37, 80)):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    found = run(tmp_path, {"images": np.stack([image, image])})["logits"]
    expected = made.model.apply(made.variables, made.preprocess([image]))["logits"]
    np.testing.assert_allclose(found, np.tile(expected, (2, 1)), atol=0.02)


@pytest.mark.parametrize(
  "fields",
  [
    {"interpolation": "bilinear", "fit": "shorter_side", "max_side": 96},
    {"interpolation": "opencv", "fit": "squash"},  # as the demo
  ],
)
def test_detector_with_preprocessing(tmp_path, fields):
  """Boxes are in pixels of the given image."""
  made = random_model("detr", **fields)
  export.write(made, "onnx", str(tmp_path), with_preprocessing=True)
  image = np.random.default_rng(1).integers(0, 256, (100, 130, 3), np.uint8)
  found = run(tmp_path, {"images": image[None]})
  resized = made.preprocess.resize(image)
  function, arguments, _ = make_program(made, one_by_one=False)
  height, width = arguments["images"].shape[1:3]
  images = np.zeros((1, height, width, 3), np.float32)
  images[0, : resized.shape[0], : resized.shape[1]] = resized
  sizes = np.array([resized.shape[:2]], np.int32)
  expected = jax.jit(function)(images, sizes)
  # The graph resizes in float32: grey levels differ by up to one.
  np.testing.assert_allclose(found["scores"], expected["scores"], atol=5e-3)
  scale = np.tile(np.array([130, 100]) / resized.shape[1::-1], 2)
  boxes = np.asarray(expected["boxes_xyxy"]) * scale
  np.testing.assert_allclose(found["boxes_xyxy"], boxes, atol=1)
