"""DETR against the official code; properties stated in its paper."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.conftest import GOLDENS, golden_folder
from tests.systems.detr.reference import model_of, read_variables
from vit_jax_zoo.registry import list_models, sharding_rules
from vit_jax_zoo.systems.detr.model import MAX_LEARNED_POSITIONS, VARIANTS, Detr, sine_positions

# Parameter counts without frozen batch norms, from the official code.
PARAMETERS = {
  "detr_r50": 41_524_768,
  "detr_r50_dc5": 41_524_768,
  "detr_r101": 60_464_672,
  "detr_r101_dc5": 60_464_672,
  "detr_r50_panoptic": 42_899_288,
  "detr_r50_dc5_panoptic": 42_899_288,
  "detr_r101_panoptic": 61_839_192,
}


@pytest.fixture(scope="module")
def golden(request):
  """`golden(name)`: config, model, variables, images [b h w c], mask (True = real), outputs."""

  @functools.cache
  def load(name):
    folder = golden_folder(name)
    config = json.loads((folder / "config.json").read_text())
    inputs, outputs = np.load(folder / "inputs.npz"), dict(np.load(folder / "outputs.npz"))
    images = np.moveaxis(inputs["images"], 1, -1)
    variables = read_variables(folder / "weights.safetensors", config)
    return config, variables, images, ~inputs["mask"], outputs

  return load


@pytest.fixture(scope="module")
def compiled(golden):
  """`compiled(name)`: the fixture's model as a function of variables, images and mask."""

  @functools.cache
  def make(name):
    model = model_of(golden(name)[0])
    return jax.jit(functools.partial(model.apply, mutable=["intermediates"]))

  return make


@pytest.fixture(scope="module")
def apply(golden, compiled):
  """`apply(name)`: predictions of the fixture's model, computed once."""

  @functools.cache
  def run(name):
    _, variables, images, mask, _ = golden(name)
    return compiled(name)(variables, images, mask)

  return run


@pytest.mark.parametrize("name", ["detr_a", "detr_dc5_a", "detr_panoptic_a"])
def test_predictions_equal_official_code(golden, apply, name):
  config, variables, *_, expected = golden(name)
  got, intermediates = apply(name)
  assert sum(x.size for x in jax.tree.leaves(variables)) == config["num_params"]
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
  close(got["logits"], expected["pred_logits"])
  close(got["boxes_cxcywh"], expected["pred_boxes"], atol=1e-5)
  close(got["auxiliary_logits"], expected["aux_logits"])
  close(got["auxiliary_boxes_cxcywh"], expected["aux_boxes"], atol=1e-5)
  if "memory" in expected:
    memory = np.moveaxis(intermediates["intermediates"]["memory"][0], -1, 1)
    close(memory, expected["memory"], atol=5e-5)
  if config["masks"]:
    maps = np.moveaxis(intermediates["intermediates"]["mask_maps"][0], -1, 2)
    close(maps, expected["bbox_mask"], atol=1e-5)
    close(got["mask_logits"], expected["pred_masks"])


def test_parameter_counts_equal_official_code():
  """Reads the golden file, whose counts `tests/test_registry.py` computes again."""
  counts = json.loads((GOLDENS / "param_counts.json").read_text())
  assert {name: n for name, n in counts.items() if name.startswith("detr_")} == PARAMETERS


def test_parameter_counts_cover_all_variants():
  assert set(PARAMETERS) == set(list_models("detr_*")) == set(VARIANTS)


def test_unrolled_layers_equal_scanned_layers(golden, apply):
  config, variables, images, mask, _ = golden("detr_a")
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  unrolled = {}
  for name, value in flat.items():
    side = name.split("/")[1] if "/" in name else ""
    if name.startswith("transformer/") and side in ("encoder", "decoder"):
      for i, layer in enumerate(value):
        unrolled[name.replace(f"/{side}/", f"/{side}_{i}/", 1)] = layer
    else:
      unrolled[name] = value
  params = traverse_util.unflatten_dict(unrolled, sep="/")
  model = model_of(config, scan_layers=False, remat="full")
  got = jax.jit(model.apply)(variables | {"params": params}, images, mask)
  for name, value in apply("detr_a")[0].items():
    np.testing.assert_allclose(got[name], value, atol=1e-5)


def test_predictions_ignore_padded_pixels(golden, apply, compiled):
  _, variables, images, mask, _ = golden("detr_a")
  noisy = np.where(mask[..., None], images, 1e3).astype(np.float32)
  got, _ = compiled("detr_a")(variables, noisy, mask)
  for name, value in apply("detr_a")[0].items():
    np.testing.assert_allclose(got[name], value, atol=1e-5)


def test_attention_weights_of_padding_are_zero(golden, apply):
  *_, expected = golden("detr_a")
  intermediates = apply("detr_a")[1]["intermediates"]["transformer"]
  keep = ~expected["mask_0"].reshape(2, -1)
  for weights in (
    intermediates["encoder"]["attention"]["weights"][0],
    intermediates["decoder"]["cross_attention"]["weights"][0],
  ):
    hidden = np.where(keep[None, :, None, None], 0, weights)
    assert hidden.max() == 0
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  assert not keep.all()


def test_masked_backbone_ignores_batch_padding(golden):
  config, variables, images, mask, _ = golden("detr_dc5_a")
  padded = jax.jit(model_of(config, masked_backbone=True).apply)(variables, images, mask)
  alone = jax.jit(model_of(config).apply)
  for i, (height, width) in enumerate(config["sizes"]):
    single = alone(variables, images[i : i + 1, :height, :width])
    for key in ("logits", "boxes_cxcywh"):
      np.testing.assert_allclose(padded[key][i], single[key][0], atol=2e-5)


def test_predictions_without_mask_treat_all_pixels_as_valid(golden, apply):
  config, variables, images, mask, _ = golden("detr_a")
  assert mask[0].all()
  alone = jax.jit(model_of(config).apply)(variables, images[:1])
  for key in ("logits", "boxes_cxcywh"):
    np.testing.assert_allclose(alone[key][0], apply("detr_a")[0][key][0], atol=1e-5)


def test_sine_positions_equal_official_code(load_golden):
  config, inputs, outputs = load_golden("detr_fn_a")
  keep = jnp.asarray(~inputs["pos_mask"])
  width = 2 * config["pos"]["num_pos_feats"]
  got = jax.jit(sine_positions, static_argnums=1)(keep, width)
  np.testing.assert_allclose(np.moveaxis(got, -1, 1), outputs["pos_norm"], atol=2e-6)


TINY = {
  "num_classes": 5,
  "num_queries": 4,
  "width": 128,
  "encoder_depth": 2,
  "decoder_depth": 2,
  "mlp_dim": 32,
  "mask_head": True,
  "backbone": {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4},
}


@pytest.fixture(scope="module")
def tiny():
  model = Detr(**TINY)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 48, 64, 3)).astype(np.float32))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  # Random numbers: compiling an initialisation takes a minute.
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(x.ndim == 1, 0.1, x.shape).astype(np.float32)), shapes
  )
  return model, variables, images


def test_gradients_are_finite_and_nonzero(tiny):
  model, variables, images = tiny

  @jax.jit
  def gradient(params):
    def loss(params):
      outputs = model.apply(
        variables | {"params": params}, images, train=True, rngs={"dropout": jax.random.key(2)}
      )
      return sum(jnp.sum(jnp.sin(x + 0.3)) for x in outputs.values())

    return jax.grad(loss)(params)

  for name, value in traverse_util.flatten_dict(gradient(variables["params"]), sep="/").items():
    assert np.isfinite(value).all(), name
    if not name.endswith("key/bias"):  # softmax is invariant to a key bias
      assert np.abs(value).max() > 0, name


@pytest.mark.slow
def test_jit_equals_eager(tiny):
  model, variables, images = tiny
  eager = model.apply(variables, images)
  jitted = jax.jit(model.apply)(variables, images)
  for name, value in eager.items():
    np.testing.assert_allclose(jitted[name], value, atol=1e-4)


def test_bfloat16_predictions_are_near_float32(golden, apply):
  config, variables, images, mask, _ = golden("detr_panoptic_a")
  half = jax.jit(model_of(config, dtype="bfloat16").apply)(variables, images, mask)
  exact = apply("detr_panoptic_a")[0]
  for name, value in half.items():
    assert value.dtype == jnp.float32, name
    assert value.shape == exact[name].shape
  for name in ("boxes_cxcywh", "logits"):  # relative: these weights give large values
    error = np.linalg.norm(half[name] - exact[name]) / np.linalg.norm(exact[name])
    assert error < 0.15, name


def test_initial_scales_equal_official_code():
  model = Detr(**TINY | {"mask_head": False})

  @jax.jit
  def initial():
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    decoder = params["transformer"]["decoder"]
    return {
      "key": decoder["cross_attention"]["key"]["kernel"],
      "out": decoder["cross_attention"]["out"]["kernel"],
      "hidden": decoder["mlp"]["hidden"]["bias"],
      "mlp": decoder["mlp"]["out"]["bias"],
      "class_kernel": params["class_head"]["kernel"],
      "class_bias": params["class_head"]["bias"],
      "queries": params["query_embedding"],
    }

  values = initial()
  bound = {name: float(np.abs(value).max()) for name, value in values.items()}
  width, mlp_dim = TINY["width"], TINY["mlp_dim"]
  # The packed [3d d] matrix has Xavier's bound sqrt(6 / (d + 3d)), the [d d] one sqrt(6 / 2d).
  assert bound["key"] == pytest.approx((1.5 / width) ** 0.5, rel=1e-2)
  assert bound["out"] == pytest.approx((3 / width) ** 0.5, rel=1e-2)
  assert bound["hidden"] == pytest.approx(width**-0.5, rel=0.1)
  assert bound["mlp"] == pytest.approx(mlp_dim**-0.5, rel=0.1)
  assert bound["class_kernel"] == pytest.approx(width**-0.5, rel=0.05)
  assert bound["class_bias"] < width**-0.5
  assert np.std(values["queries"]) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"position_embedding": "sin"}, "did you mean 'sine'"),
    ({"width": 30}, "width.*multiple of 4"),
    ({"num_queries": 0}, "num_queries: 0"),
    ({"num_heads": 0}, "num_heads: 0"),
    ({"mlp_dim": -1}, "mlp_dim: -1"),
    ({"dropout_rate": 7.0}, "dropout_rate: 7"),
    ({"width": 72}, "width.*multiple of 64"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    jax.eval_shape(Detr(**(TINY | fields)).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert "\n" not in str(error.value)


def test_decoder_sizes_differ_from_encoder():
  sizes = {"width": 8, "num_heads": 2, "mlp_dim": 16, "backbone": TINY["backbone"]}
  model = Detr(**sizes, decoder={"mlp_dim": 24, "num_heads": 4})
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  encoder, decoder = shapes["transformer"]["encoder"], shapes["transformer"]["decoder"]
  assert encoder["mlp"]["hidden"]["kernel"].shape == (6, 8, 16)
  assert decoder["mlp"]["hidden"]["kernel"].shape == (6, 8, 24)
  assert encoder["attention"]["query"]["kernel"].shape == (6, 8, 2, 4)
  assert decoder["cross_attention"]["query"]["kernel"].shape == (6, 8, 4, 2)


def test_learned_positions_of_large_image_raise():
  model = Detr(**TINY, position_embedding="learned")
  side = 32 * MAX_LEARNED_POSITIONS + 1
  with pytest.raises(ValueError, match=r"position_embedding.*up to 50"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, side, 3)))


def test_sharding_rules_match_parameters(tiny):
  paths = list(traverse_util.flatten_dict(tiny[1]["params"], sep="/"))
  for pattern, _ in sharding_rules("detr_r50"):
    assert any(re.fullmatch(pattern, path) for path in paths), pattern
