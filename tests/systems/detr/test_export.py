"""Exports of DETR as orbax, hf and StableHLO: preprocessing and detections."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.inference.base import Options, create_predictor
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.inference.programs import make_program, padding_notes, program_size
from vit_jax_zoo.systems.detr.model import Detr
from vit_jax_zoo.systems.detr.weights_hf import read_preprocess
from vit_jax_zoo.weights import Preprocess, Pretrained

NAMES = ("N/A", "cat", "dog", "cow")
PROCESSORS = {
  "shortest_edge": {"size": {"shortest_edge": 64, "longest_edge": 96}},
  "max_height": {
    "size": {"max_height": 96, "max_width": 96},
    "pad_size": {"height": 96, "width": 96},
    "image_mean": [0.1, 0.2, 0.3],
  },
}


def detector(name="shortest_edge"):
  backbone = {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4}
  model = Detr(4, 6, 16, 1, 1, 2, 16, backbone=backbone)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(float(x.ndim == 1), 0.3, x.shape).astype(np.float32), shapes
  )
  preprocess = read_preprocess(PROCESSORS[name], name)
  config = {"num_classes": 4, "image_size": preprocess.image_size}
  return Pretrained(model, variables, preprocess, config, "detection", {"class_names": NAMES})


def random_image(height=100, width=50):
  return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections(path):
  predictor = create_predictor(load(str(path)), Options(threshold=0.0))
  return predictor(random_image()).record["detections"]


def test_export_pth_warns_of_unstored_fields(tmp_path, caplog):
  with caplog.at_level("WARNING"):
    export.write(detector("max_height"), "pth", str(tmp_path / "x.safetensors"))
  for lost in ("fit=inside (read as shorter_side)", "class_names", "num_heads=2 (read as 8)"):
    assert lost in caplog.text


@pytest.mark.parametrize(
  "name", ["max_height", pytest.param("shortest_edge", marks=pytest.mark.long)]
)
def test_exports_detect_same_boxes(name, tmp_path):
  pretrained = detector(name)
  for form in ("orbax", "hf", "stablehlo"):
    export.write(pretrained, form, str(tmp_path / form))
  ours, theirs = (load_pretrained(str(tmp_path / form)) for form in ("orbax", "hf"))
  assert ours.preprocess == theirs.preprocess == pretrained.preprocess
  for loaded in (ours, theirs):
    assert (loaded.model.num_heads, loaded.class_names) == (pretrained.model.num_heads, NAMES)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, pretrained.variables)
  expected = detections(tmp_path / "hf")
  assert len(expected) == 6

  notes = json.loads((tmp_path / "stablehlo/model.json").read_text())
  assert notes["preprocess"]["mean"] == list(pretrained.preprocess.mean)
  height, width = map(int, notes["images"][1:3])
  resized = pretrained.preprocess.resize(random_image())
  images = np.full((3, height, width, 3), 7, np.float32)
  images[:, : resized.shape[0], : resized.shape[1]] = resized
  program = (tmp_path / "stablehlo/model.stablehlo").read_bytes()
  sizes = np.array([resized.shape[:2]] * 3, np.int32)
  outputs = jax.export.deserialize(bytearray(program)).call(images, sizes)
  assert outputs["boxes_xyxy"].shape == (3, 6, 4)
  order = np.argsort(-np.asarray(outputs["scores"][1]), kind="stable")
  scores = np.asarray(outputs["scores"][1])[order]
  np.testing.assert_allclose(scores, [d["score"] for d in expected], atol=1e-4)
  scale = np.array(random_image().shape[1::-1]) / resized.shape[1::-1]
  left, top, right, bottom = (np.asarray(outputs["boxes_xyxy"][1])[order] * np.tile(scale, 2)).T
  boxes = np.array([d["bbox"] for d in expected])
  clipped = np.clip(np.stack([left, top, right, bottom]), 0, np.array([[50], [100], [50], [100]]))
  corners = np.stack([clipped[0], clipped[1], clipped[2] - clipped[0], clipped[3] - clipped[1]])
  np.testing.assert_allclose(corners.T, boxes, atol=1e-2)


@pytest.mark.parametrize("longest", [96, 640, 1333])
@pytest.mark.parametrize("rounding", ["side", "ratio", "floor"])
def test_program_holds_every_resized_image(longest, rounding):
  preprocess = Preprocess((64, 64), fit="shorter_side", max_side=longest, rounding=rounding)
  side, _ = program_size(dataclasses.replace(detector(), preprocess=preprocess))
  sizes = [(short, long) for short in range(1, 60) for long in range(short, 16 * short + 1, 7)]
  assert max(max(preprocess.resized_size(*size)) for size in sizes) <= side < longest + 40


def test_program_states_that_masks_depend_on_padding(caplog):
  made = detector()
  assert not padding_notes(made)
  masked = dataclasses.replace(made, model=made.model.clone(mask_head=True))
  with caplog.at_level("WARNING"):
    _, _, notes = make_program(masked)
  assert "mask_logits" in caplog.text
  assert any("mask_logits" in step for step in notes["steps"])
  padded = dataclasses.replace(masked, preprocess=detector("max_height").preprocess)
  assert not padding_notes(padded)  # predict pads as the program


def write_run(path, transforms, **task):
  """Writes a run's folder: checkpoint, config.json, and data.json with image shapes."""
  export.write(detector(), "orbax", str(path))
  config = json.loads((path / "config.json").read_text())
  del config["preprocess"]
  config["task"] = {"name": "detection", "num_classes": None, "class_names": None, **task}
  config["data"]["eval"]["test"]["transforms"] = transforms
  (path / "config.json").write_text(json.dumps(config))
  data = json.loads((path / "data.json").read_text())
  data["shapes"] = {"image": [800, 1216, 3]}
  (path / "data.json").write_text(json.dumps(data))


def test_run_uses_preprocessing_of_evaluation(tmp_path):
  load_objects = {"name": "load_objects", "as_annotated": True}
  resize = {"name": "resize_shorter", "shorter": 64, "longest": 96}
  write_run(tmp_path / "run", [load_objects, resize, {"name": "pad_objects"}])
  preprocess = load_pretrained(str(tmp_path / "run")).preprocess
  assert (preprocess.fit, preprocess.image_size, preprocess.max_side) == (
    "shorter_side",
    (64, 64),
    96,
  )
  assert preprocess.mean == (0.485, 0.456, 0.406)
  export.write(load_pretrained(str(tmp_path / "run")), "hf", str(tmp_path / "hf"))
  processor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
  assert processor["size"] == {"shortest_edge": 64, "longest_edge": 96}
  assert processor["image_mean"] == [0.485, 0.456, 0.406]
  assert processor["image_std"] == [0.229, 0.224, 0.225]
  assert detections(tmp_path / "hf") == detections(tmp_path / "run")


def test_run_with_mean_and_fixed_size_is_read(tmp_path):
  resize = {"name": "resize", "size": [40, 48], "method": "antialias"}
  write_run(tmp_path / "run", [resize], image_mean=[0.5, 0.4, 0.3], image_std=0.25)
  preprocess = load_pretrained(str(tmp_path / "run")).preprocess
  assert (preprocess.fit, preprocess.image_size) == ("squash", (40, 48))
  assert (preprocess.mean, preprocess.std) == ((0.5, 0.4, 0.3), 0.25)
