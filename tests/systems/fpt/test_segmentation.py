import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.variables import random_variables
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.fpt.transformer import GlobalConvolution

TINY = {
  "num_classes": 3,
  "width": 8,
  "kernel_sizes": (1, 3),
  "window": 3,
  "backbone": {
    "blocks": (1, 1, 1, 1),
    "widths": (4, 4, 4, 4),
    "stem_width": 4,
    "norm": "batch_norm",
  },
}


def count_parameters(name, **fields):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(create_model(name, **fields).init, jax.random.key(0), images)["params"]
  return {key: sum(x.size for x in jax.tree.leaves(part)) for key, part in shapes.items()}


def test_parameter_counts_equal_sums_of_layers():
  counts = count_parameters("fpt_segmentation_r50")
  plain = count_parameters("fpt_segmentation_r50_ufp")
  assert counts["backbone"] == 23_508_032  # torchvision's resnet50 without its classifier
  c, d = 2048, 256
  branches = (c * d + d) + sum(2 * (k * c * d + d + k * d * d + d) for k in (7, 15, 31))
  assert counts["pyramid"] == branches + 4 * 2 * d
  attention = 4 * (3 * d * d + 2 * d) + 6 * (3 * d * d + 4 * d)
  joins = 4 * (9 * 5 * d * d + 2 * d)
  assert counts["transformer"] == attention + 6 * (2 * d * d + 18 * d * d) + joins
  assert counts["head_conv"] + counts["head"] == 9 * 4 * d * d + 2 * d + d * 19 + 19
  assert {k: v for k, v in counts.items() if k != "transformer"} == plain


def test_global_convolution_is_sum_of_two_separable_kernels():
  """Without biases each branch is an outer product; the sum is a full kernel of rank two."""
  module = GlobalConvolution(1, 3)
  x = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(1)
  params = jax.jit(module.init)(jax.random.key(0), x)["params"]
  out = np.asarray(module.apply({"params": params}, x))[0, ..., 0]
  kernels = {k: np.asarray(p["kernel"]).ravel()[::-1] for k, p in params.items()}
  expected = np.outer(kernels["column"], kernels["column_row"])
  expected += np.outer(kernels["row_column"], kernels["row"])
  np.testing.assert_allclose(out[1:4, 1:4], expected, atol=1e-5)
  assert np.abs(out).sum() == pytest.approx(np.abs(out[1:4, 1:4]).sum())


@pytest.fixture(scope="module")
def tiny():
  model = create_model("fpt_segmentation_r50", **TINY, auxiliary_head=True)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 48, 3)), jnp.float32)
  return model, random_variables(model.init, images), images


@pytest.mark.long
def test_gradients_are_finite_and_nonzero(tiny):
  model, variables, images = tiny

  def loss(params):
    out, _ = model.apply(
      {**variables, "params": params},
      images,
      train=True,
      rngs={"dropout": jax.random.key(1)},
      mutable=["batch_stats"],
    )
    assert {k: v.shape for k, v in out.items()} == {
      "logits": (2, 5, 6, 3),
      "auxiliary_logits": (2, 5, 6, 3),
    }
    return sum(jnp.mean(jnp.sin(x)) for x in out.values())

  for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables["params"])):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.isfinite(grad).all(), name
    if "pyramid/branch" not in name or "bias" not in name:  # batch norm removes that bias
      assert np.any(grad != 0), name


def test_bfloat16_outputs_are_near_float32(tiny):
  model, variables, images = tiny
  exact = jax.jit(model.apply)(variables, images)
  half = jax.jit(model.clone(dtype="bfloat16").apply)(variables, images)
  assert set(exact) == set(half) == {"logits"}
  assert exact["logits"].dtype == half["logits"].dtype == jnp.float32
  correlation = np.corrcoef(np.ravel(exact["logits"]), np.ravel(half["logits"]))[0, 1]
  assert correlation > 0.99


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"neck": "fpn"}, "unknown neck 'fpn'"),
    ({"num_classes": 0}, "num_classes: 0"),
    ({"width": 0}, "width: 0"),
    ({"dropout_rate": 1.0}, "dropout_rate: 1"),
    ({"kernel_sizes": (1, 4)}, "kernel_sizes: 4"),
  ],
)
def test_invalid_fields_raise(fields, message):
  model = create_model("fpt_segmentation_r50", **{**TINY, **fields})
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
