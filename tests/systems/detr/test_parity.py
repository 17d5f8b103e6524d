"""Exported DETRs loaded by transformers: boxes and masks."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.systems.detr.files import hugging_face_folder, official_file, overrides_of
from tests.systems.detr.test_weights import export_of
from vit_jax_zoo import load_pretrained
from vit_jax_zoo.systems.detr import weights_hf as detr_hf
from vit_jax_zoo.systems.detr import weights_official as detr_official
from vit_jax_zoo.systems.detr.model import Detr
from vit_jax_zoo.weights import Pretrained
from vit_jax_zoo.weights.preprocess import DETECTION
from vit_jax_zoo.weights.readers import read_torch

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def outputs_of(folder, kind, images, mask):
  """Returns the outputs of the folder's model in transformers."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
  assert not report["missing_keys"]
  # Batch counters, which the published files hold too.
  assert all(key.endswith(".num_batches_tracked") for key in report["unexpected_keys"])
  assert not report["mismatched_keys"]
  with torch.no_grad():
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    return model.eval()(pixels, pixel_mask=torch.from_numpy(mask.astype(np.int64)))


def random_inputs(height=96, width=128):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, height, width, 3)).astype(np.float32)
  mask = np.ones((2, height, width), bool)
  mask[1, 61:], mask[1, :, 100:] = False, False
  return np.where(mask[..., None], images, 0).astype(np.float32), mask


@pytest.mark.parametrize("name", ["detr_a", "detr_panoptic_a", "detr_hf_a", "detr_hf_panoptic_a"])
def test_export_predicts_same_in_transformers(name, tmp_path):
  source = hugging_face_folder(name, tmp_path / "in") if "_hf_" in name else official_file(name)
  loaded = load_pretrained(source)
  detr_hf.write_checkpoint(str(tmp_path / "out"), export_of(loaded))
  images, mask = random_inputs()
  ours = jax.jit(loaded.model.apply)(loaded.variables, images, mask)
  kind = "DetrForSegmentation" if loaded.model.mask_head else "DetrForObjectDetection"
  theirs = outputs_of(str(tmp_path / "out"), kind, images, mask)
  np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), atol=1e-4)
  np.testing.assert_allclose(ours["boxes_cxcywh"], theirs.pred_boxes.numpy(), atol=1e-4)
  if loaded.model.mask_head:
    masks = theirs.pred_masks.numpy()
    np.testing.assert_allclose(ours["mask_logits"], masks, atol=1e-4 * np.abs(masks).max())


def test_load_of_file_saved_by_transformers_is_exact(tmp_path):
  transformers = pytest.importorskip("transformers")
  loaded = load_pretrained(official_file("detr_panoptic_a"))
  detr_hf.write_checkpoint(str(tmp_path / "ours"), export_of(loaded))
  theirs = transformers.DetrForSegmentation.from_pretrained(str(tmp_path / "ours"))
  theirs.save_pretrained(str(tmp_path / "theirs"))
  again = load_pretrained(str(tmp_path / "theirs"))
  assert again.model.clone(dropout_rate=0.1) == loaded.model.clone(dropout_rate=0.1)
  for array, expected in zip(
    jax.tree.leaves(again.variables), jax.tree.leaves(loaded.variables), strict=True
  ):
    np.testing.assert_array_equal(array, expected)


def test_export_with_learned_positions_predicts_same_in_transformers(tmp_path):
  loaded = load_pretrained(official_file("detr_a"), position_embedding="sine")
  rng = np.random.default_rng(0)
  params = dict(loaded.variables["params"])
  for name in ("row_embedding", "column_embedding"):
    params[name] = rng.normal(size=(50, 32)).astype(np.float32)
  model = loaded.model.clone(position_embedding="learned")
  variables = {**loaded.variables, "params": params}
  learned = dataclasses.replace(loaded, model=model, variables=variables)
  detr_hf.write_checkpoint(str(tmp_path), export_of(learned))
  images, mask = random_inputs()
  ours = jax.jit(model.apply)(variables, images, mask)
  theirs = outputs_of(str(tmp_path), "DetrForObjectDetection", images, mask)
  np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), atol=1e-4)


def test_export_of_dilated_backbone_predicts_same_with_timm(tmp_path):
  """DC5 at its real size: transformers supports dilation only with timm's backbones."""
  pytest.importorskip("timm")
  backbone = {"blocks": (3, 4, 6, 3), "output_stride": 16}
  model = Detr(5, 4, 64, 1, 1, 8, 64, backbone=backbone)
  images, mask = random_inputs()
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(float(x.ndim == 1), 0.02, x.shape).astype(np.float32), shapes
  )
  detr_hf.write_checkpoint(
    str(tmp_path), export_of(Pretrained(model, variables, DETECTION, {}, "detection"))
  )
  ours = jax.jit(model.apply)(variables, images, mask)
  theirs = outputs_of(str(tmp_path), "DetrForObjectDetection", images, mask)
  np.testing.assert_allclose(ours["boxes_cxcywh"], theirs.pred_boxes.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["detr_dc5_a", "detr_panoptic_a"])
def test_pth_round_trip_is_exact(name, tmp_path):
  torch = pytest.importorskip("torch")
  loaded = load_pretrained(official_file(name), **overrides_of(name))
  path = str(tmp_path / "detr.pth")
  detr_official.write_checkpoint(path, export_of(loaded))
  assert list(torch.load(path, weights_only=True)) == ["model"]
  again = load_pretrained(path, **overrides_of(name))
  for array, expected in zip(
    jax.tree.leaves(again.variables), jax.tree.leaves(loaded.variables), strict=True
  ):
    np.testing.assert_array_equal(array, expected)
  assert all(isinstance(value, np.ndarray) for value in read_torch(path).values())
