"""The layer stack: scanned and unrolled, remat policies, stochastic depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import system_module
from vit_jax_zoo.nn.drop import DropPath, drop_path_rates
from vit_jax_zoo.nn.transformer import REMAT_POLICIES, Stack
from vit_jax_zoo.weights import key_map as table

vit = system_module("vit", "model")
BLOCK = functools.partial(vit.EncoderBlock, num_heads=2, mlp_dim=16)
DEPTH = 2
TOKENS = jax.random.normal(jax.random.key(7), (2, 5, 8))


def encoder(**fields):
  return Stack(BLOCK, DEPTH, **fields)


@pytest.fixture(scope="module")
def variables():
  shapes = jax.eval_shape(lambda: encoder().init(jax.random.key(0), TOKENS, train=False))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def reference(variables):
  return value_and_gradient(encoder(), variables)


def value_and_gradient(module, variables):
  def loss(variables):
    return jnp.sum(jnp.sin(module.apply(variables, TOKENS, train=False)[0]))

  return jax.jit(jax.value_and_grad(loss))(variables)


def paths(tree):
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in flat}


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_policies_equal(remat, variables, reference):
  given = value_and_gradient(encoder(remat=remat), variables)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), given, reference)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_unrolled_equals_scanned(remat, variables, reference):
  module = encoder(scan=False, remat=remat)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), TOKENS, train=False))
  layers = table.unroll(paths(variables["params"]))
  assert {k: v.shape for k, v in layers.items()} == {
    k: v.shape for k, v in paths_of_shapes(shapes["params"]).items()
  }
  unrolled = jax.tree.unflatten(
    jax.tree.structure(shapes), [layers[k.removeprefix("params/")] for k in paths_of_shapes(shapes)]
  )
  value, gradient = value_and_gradient(module, unrolled)
  np.testing.assert_allclose(value, reference[0], atol=2e-5)
  expected = table.unroll(paths(reference[1]["params"]))
  for path, array in paths(gradient["params"]).items():
    np.testing.assert_allclose(array, expected[path], atol=2e-5)


def paths_of_shapes(tree):
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


@pytest.mark.parametrize(("remat", "kept"), [("dots", 8), ("attention", 4), ("full", 0)])
def test_remat_policy_residuals(remat, kept):
  """In multiples of the width per token, for an MLP of four widths, plus the block's input."""
  module = Stack(functools.partial(BLOCK, mlp_dim=32), 1, scan=False, remat=remat)
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), TOKENS, train=False))

  def residuals(params, tokens):
    _, backward = jax.vjp(lambda t: module.apply(params, t, train=False)[0], tokens)
    return backward

  saved = jax.tree.leaves(jax.eval_shape(residuals, variables, TOKENS))
  activations = [x for x in saved if x.shape[:2] == TOKENS.shape[:2]]
  widths = sum(x.size for x in activations) / TOKENS.size
  assert widths == kept + 1


def test_unknown_remat_policy_raises():
  with pytest.raises(ValueError, match="'ful'"):
    encoder(remat="ful").init(jax.random.key(0), TOKENS, train=False)


def test_intermediates_of_every_block(variables):
  apply = jax.jit(lambda v: encoder().apply(v, TOKENS, train=False, mutable="intermediates"))
  (out, _), state = apply(variables)
  blocks = state["intermediates"]["blocks"]
  np.testing.assert_allclose(blocks["output"][0][-1], out, atol=1e-6)
  assert blocks["attention"]["weights"][0].shape == (DEPTH, 2, 2, 5, 5)


def test_drop_path_rate_and_mean():
  branch = jnp.ones((4000, 2, 3))
  dropped = DropPath().apply({}, branch, 0.25, train=True, rngs={"dropout": jax.random.key(0)})
  by_example = np.asarray(dropped).reshape(4000, -1)
  assert set(np.unique(by_example)) == {np.float32(0), np.float32(1 / 0.75)}
  assert (by_example == by_example[:, :1]).all()  # the whole branch of an example
  assert abs((by_example[:, 0] == 0).mean() - 0.25) < 0.03
  assert DropPath().apply({}, branch, 0.25, train=False) is branch


def test_drop_path_linear_rates_in_scanned_blocks(variables):
  assert drop_path_rates(0.2, 3) == pytest.approx((0, 0.1, 0.2))
  assert drop_path_rates(0.2, 1) == (0,)
  with pytest.raises(ValueError, match="drop_path_rate"):
    drop_path_rates(1.0, 3)
  rates = drop_path_rates(0.5, DEPTH)
  run = jax.jit(
    lambda v, key: encoder().apply(
      v, TOKENS, per_layer=rates, train=True, rngs={"dropout": key}, mutable="intermediates"
    )
  )
  outputs = [run(variables, jax.random.key(i))[1]["intermediates"]["blocks"] for i in range(2)]
  first, second = (np.asarray(o["output"][0]) for o in outputs)
  np.testing.assert_array_equal(first[0], second[0])  # the first block's rate is 0
  assert np.abs(first[-1] - second[-1]).max() > 1e-3
