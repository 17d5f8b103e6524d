"""TTSR against the official code: outputs, intermediate maps, parameter counts, checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import golden_folder
from tests.systems.ttsr.goldens import load_golden_model, nhwc
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.ttsr.model import TTSR
from vit_jax_zoo.systems.ttsr.search import find_matches

TINY = {"width": 8, "depths": (1, 1, 1, 1), "texture_widths": (4, 6, 8)}
PICTURES = ("lr", "lrsr", "ref", "refsr")


@functools.cache
def golden_run(dtype="float32", scan_layers=False):
  inputs = np.load(golden_folder("ttsr_a") / "inputs.npz")
  model, variables = load_golden_model(dtype=dtype, scan_layers=scan_layers, block_size=(50, 37))
  apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
  return apply(variables, *(nhwc(inputs[name]) for name in PICTURES))


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.long), True])
def test_outputs_equal_official_code(load_golden, scan_layers):
  _, _, expected = load_golden("ttsr_a")
  out, state = golden_run(scan_layers=scan_layers)
  maps = {k: v[0] for k, v in state["intermediates"].items() if k.startswith(("after", "un"))}

  def close(found, name, tolerance=1e-5):
    found = np.moveaxis(found, -1, 1)
    tolerance *= max(1, np.abs(expected[name]).max())
    np.testing.assert_allclose(found, expected[name], atol=tolerance, err_msg=name)

  np.testing.assert_array_equal(out["hard_attention"].reshape(1, -1), expected["R_argmax"])
  close(out["soft_attention"][..., None], "S")
  for level, texture in zip((3, 2, 1), out["textures"], strict=True):
    close(texture, f"T_lv{level}")
  close(maps["after_shallow"], "mainnet/SFE")
  close(maps["after_exchange3"][0], "mainnet/ex123_0")
  close(maps["after_exchange3"][2], "mainnet/ex123_2")
  close(maps["unclipped"], "mainnet/sr_unclamped", 2e-5)
  close(out["image"], "sr", 2e-5)  # in [-1, 1]; half of it in [0, 1]


@pytest.mark.long
def test_bfloat16_model_selects_same_patches(load_golden):
  _, inputs, expected = load_golden("ttsr_a")
  out, _ = golden_run("bfloat16")
  np.testing.assert_array_equal(out["hard_attention"].reshape(1, -1), expected["R_argmax"])
  np.testing.assert_allclose(out["soft_attention"][:, None], expected["S"], atol=1e-5)
  assert out["textures"][0].dtype == jnp.bfloat16
  assert out["image"].dtype == jnp.float32
  np.testing.assert_allclose(np.moveaxis(out["image"], -1, 1), expected["sr"], atol=0.05)
  # With bfloat16 features, other patches would be selected.
  model, variables = load_golden_model(dtype="bfloat16")
  queries, references = (
    model.apply(variables, nhwc(inputs[name]), method="textures")[2] for name in ("lrsr", "refsr")
  )
  half = find_matches(queries, references).index
  assert np.mean(np.asarray(half).reshape(1, -1) != expected["R_argmax"]) > 0.01


def random_images(seed=0, batch=2):
  keys = jax.random.split(jax.random.key(seed), 4)
  sides = ((3, 4), (12, 16), (8, 20), (8, 20))
  return [
    jax.random.uniform(key, (batch, *side, 3), minval=-1, maxval=1)
    for key, side in zip(keys, sides, strict=True)
  ]


def test_gradients_are_finite_and_nonzero():
  model = TTSR(**TINY)
  images = random_images()
  shapes = jax.eval_shape(model.init, jax.random.key(0), *images)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  rng = np.random.default_rng(0)  # faster than compiling an initialisation
  variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), shapes)

  def loss(params):
    out = model.apply({"params": params}, *images, train=True)
    return jnp.mean((out["image"] - 0.3) ** 2), out

  gradients, out = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  assert out["image"].shape == (2, 12, 16, 3)
  assert [t.shape for t in out["textures"]] == [(2, 3, 4, 8), (2, 6, 8, 6), (2, 12, 16, 4)]
  assert out["hard_attention"].shape == out["soft_attention"].shape == (2, 3, 4)
  assert out["hard_attention"].max() < 2 * 5
  assert jnp.abs(out["image"]).max() <= 1
  for leaf in jax.tree.leaves(gradients):
    assert np.isfinite(leaf).all()
    assert np.abs(leaf).max() > 0  # also for the extractor, through textures and relevance


def count_parameters(model):
  small, large = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32) for side in (4, 16))
  shapes = jax.eval_shape(model.init, jax.random.key(0), small, large, large, large)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def test_parameter_counts_equal_published():
  constants = 12  # normalisation constants, which the released file stores as parameters
  assert count_parameters(create_model("ttsr")) == 6_729_615 - constants
  assert count_parameters(create_model("ttsr_tiny")) == 755_199 - constants


@pytest.mark.parametrize(
  ("field", "size"), [("width", -1), ("depths", (1, 1, 0, 1)), ("texture_widths", (0, 32, 64))]
)
def test_invalid_sizes_raise(field, size):
  images = [jnp.zeros((1, *side, 3)) for side in [(3, 4), (12, 16), (8, 8), (8, 8)]]
  with pytest.raises(ValueError, match=rf"{field}: .*positive"):
    jax.eval_shape(TTSR(**TINY | {field: size}).init, jax.random.key(0), *images)


@pytest.mark.parametrize(
  ("sides", "message"),
  [
    ([(3, 4), (12, 12), (8, 8), (8, 8)], "upsampled_image: .*12x12.*12x16"),
    ([(3, 4), (12, 16), (8, 10), (8, 10)], "ref_image: .*8x10"),
    ([(3, 4), (12, 16), (8, 8), (8, 12)], "blurred_ref_image: .*8x12.*8x8"),
  ],
)
def test_incompatible_image_sizes_raise(sides, message):
  images = [jnp.zeros((1, *side, 3)) for side in sides]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(TTSR(**TINY).init, jax.random.key(0), *images)
