"""TTSR's and torchvision's VGG-19 files: round trips and initialisation from them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder
from vit_jax_zoo import export, weights
from vit_jax_zoo.systems.ttsr.losses import VGG19, Discriminator
from vit_jax_zoo.systems.ttsr.model import TTSR
from vit_jax_zoo.systems.ttsr.task import SuperResolution
from vit_jax_zoo.systems.ttsr.weights import VggFormat
from vit_jax_zoo.weights.checkpoint import Pretrained
from vit_jax_zoo.weights.key_map import WeightsError, unroll
from vit_jax_zoo.weights.load import flatten_variables, writable_formats

FILE = golden_folder("ttsr_a") / "weights.safetensors"
TINY = TTSR(width=8, depths=(2, 1, 1, 1), texture_widths=(4, 8, 8))


class NarrowTask(SuperResolution):
  """The task with a narrow discriminator and VGG-19."""

  _discriminator = Discriminator((2, 4, 8, 16, 32), 64)
  _vgg = VGG19(("relu5_1",), (4, 8, 8, 8, 8))


@pytest.fixture(scope="module")
def loaded():
  return weights.load_pretrained(str(FILE))


def zero_images(batch, side):
  return np.zeros((batch, side, side, 3), np.uint8)


@functools.cache
def shapes_with_all_losses(model):
  task = NarrowTask(model, perceptual_weight=1.0, adversarial_weight=1.0)
  batch = {key: zero_images(2, 32) for key in ("upsampled_image", "image")}
  batch |= {key: zero_images(2, 32) for key in ("ref_image", "blurred_ref_image")}
  batch["low_res_image"] = zero_images(2, 8)
  return jax.eval_shape(task.init, jax.random.key(0), batch)


def zero_variables(task):
  shapes = shapes_with_all_losses(task.model)
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  if not task.adversarial_weight:
    del variables["params"]["discriminator"]
  if not task.perceptual_weight:
    del variables["vgg"]
  return variables


@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_is_exact(tmp_path, scan_layers):
  pretrained = weights.load_pretrained(str(FILE), scan_layers=scan_layers)
  assert pretrained.task == "super_resolution"
  flat = {k: np.asarray(x) for k, x in flatten_variables(pretrained.variables).items()}
  for prefix in ("", "generator/"):  # a published model, and a run
    variables = {prefix + k: x for k, x in unroll(flat).items()}
    if prefix:
      variables["discriminator/score/kernel"] = np.zeros((2, 1), np.float32)
    path = str(tmp_path / "TTSR.safetensors")
    exported = dataclasses.replace(pretrained, variables=variables)
    writable_formats("ttsr")["pt"].write_checkpoint(path, exported)
    written, original = load_file(path), load_file(FILE)
    assert set(written) == {k for k in original if not k.startswith("LTE_copy.")}
    for key, array in written.items():
      if "sub_mean" in key:
        np.testing.assert_allclose(array, original[key], rtol=1e-6)
      else:
        np.testing.assert_array_equal(array, original[key], err_msg=key)


def test_load_into_adversarial_task_fills_generator(loaded):
  task = NarrowTask(loaded.model, perceptual_weight=1.0, adversarial_weight=1.0)
  before = zero_variables(task)
  after = weights.load_into(str(FILE), before)
  for theirs, ours in zip(
    jax.tree.leaves(loaded.variables["params"]),
    jax.tree.leaves(after["params"]["generator"]),
    strict=True,
  ):
    np.testing.assert_array_equal(ours, theirs)
  assert not any(
    np.any(x) for x in jax.tree.leaves((after["params"]["discriminator"], after["vgg"]))
  )


def test_file_with_missing_or_unused_keys_raises(tmp_path):
  arrays = load_file(FILE)
  del arrays["MainNet.conv12.bias"]
  arrays["surprise"] = np.zeros(3, np.float32)
  path = tmp_path / "TTSR.safetensors"
  save_file(arrays, path)
  with pytest.raises(WeightsError, match=r"missing: up2/bias .*; unused: surprise \(3,\)"):
    weights.load_pretrained(str(path))
  del arrays["MainNet.merge_tail.conv13.weight"], arrays["LTE.slice1.0.weight"]
  save_file(arrays, path)
  with pytest.raises(WeightsError, match=r"no 'LTE\.slice1\.0.*TTSR"):
    weights.load_pretrained(str(path))


# --- VGG-19 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg():
  """Returns the parameters of a narrow random VGG-19."""
  network = NarrowTask._vgg
  shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes["params"])


def write_vgg(path, params, **more):
  flat = {f"vgg/{k}": v for k, v in traverse_util.flatten_dict(params, sep="/").items()}
  VggFormat.write_checkpoint(
    str(path), Pretrained(VGG19(("relu5_1",)), flat, weights.Preprocess((8, 8)), {})
  )
  save_file(load_file(path) | more, path)
  return str(path)


def test_vgg_round_trip_is_exact(tmp_path, vgg):
  path = write_vgg(tmp_path / "vgg.safetensors", vgg)
  published = load_file(path)
  kernels = [f"features.{i}.weight" for i in (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28)]
  assert [
    k for k in sorted(published, key=lambda k: int(k.split(".")[1])) if "weight" in k
  ] == kernels
  again = weights.load_parts({"vgg": path}, {"vgg": vgg})["vgg"]
  assert jax.tree.all(jax.tree.map(np.array_equal, again, vgg))


def test_export_of_vgg_from_run_is_exact(tmp_path, vgg):
  vgg_file = write_vgg(tmp_path / "vgg19.safetensors", vgg)
  task = NarrowTask(TINY, perceptual_weight=1.0, vgg_file=vgg_file)
  variables = weights.load_parts(task.weight_files, zero_variables(task))
  run = weights.Pretrained(TINY, variables, weights.Preprocess((8, 8)), {}, "super_resolution")
  path = str(tmp_path / "back.safetensors")
  export.write(run, "pth-vgg19", path)
  written, original = load_file(path), load_file(vgg_file)
  assert written.keys() == original.keys()
  for key, array in written.items():
    np.testing.assert_array_equal(array, original[key])
  with pytest.raises(WeightsError, match=r"VGG-19 .*--config\.task\.vgg_file"):
    weights.load_pretrained(path)


def test_export_without_vgg_raises(tmp_path, loaded):
  with pytest.raises(WeightsError, match="pth-vgg19: "):
    export.write(loaded, "pth-vgg19", str(tmp_path / "vgg.pth"))


def test_vgg_file_initializes_loss_and_extractor(tmp_path, vgg):
  unused = {"features.30.weight": np.zeros((8, 8, 3, 3), np.float32),
            "classifier.0.weight": np.zeros((4, 4), np.float32)}  # fmt: skip
  path = write_vgg(tmp_path / "vgg19.safetensors", vgg, **unused)
  task = NarrowTask(TINY, perceptual_weight=1.0, vgg_file=path)
  variables = weights.load_parts(task.weight_files, zero_variables(task))
  assert jax.tree.all(jax.tree.map(np.array_equal, variables["vgg"], vgg))
  extractor = variables["params"]["generator"]["extractor"]
  assert set(extractor) == {"conv1_1", "conv2_1", "conv1_2", "conv2_2", "conv3_1"}
  for name, layer in extractor.items():
    np.testing.assert_array_equal(layer["kernel"], vgg[name]["kernel"])
  others = {k: v for k, v in variables["params"]["generator"].items() if k != "extractor"}
  assert not any(np.any(x) for x in jax.tree.leaves(others))
  alone = NarrowTask(TINY, vgg_file=path)  # TTSR-rec has no perceptual loss
  assert "vgg" not in weights.load_parts(alone.weight_files, zero_variables(alone))
  assert NarrowTask(TINY).weight_files == {}


def test_missing_or_other_vgg_file_raises(tmp_path, vgg):
  with pytest.raises(WeightsError, match=r"vgg19-dcbb9e9d\.pth.* vgg19_imagenet"):
    weights.load_parts({"vgg": str(tmp_path / "vgg19-dcbb9e9d.pth")}, {"vgg": vgg})
  norm = {"features.1.running_mean": np.zeros(4, np.float32)}
  path = write_vgg(tmp_path / "vgg19_bn.safetensors", vgg, **norm)
  with pytest.raises(WeightsError, match="VGG with batch norm"):
    weights.load_parts({"vgg": path}, {"vgg": vgg})
