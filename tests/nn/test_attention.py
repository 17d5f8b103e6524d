import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.nn.attention import (
  MultiHeadAttention,
  attend,
  attend_dropping,
  key_padding_mask,
)
from vit_jax_zoo.training.sharding import create_mesh


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def variables_of(module, *inputs):
  return jax.jit(module.init)(jax.random.key(1), *inputs)


def run(module, variables, *inputs, mask=None, **kwargs):
  apply = jax.jit(lambda v, mask, *xs: module.apply(v, *xs, mask=mask, **kwargs))
  return apply(variables, mask, *inputs)


def softmax_by_hand(query, key, value, mask):
  scores = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
  weights = np.exp(scores) * mask
  return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attend_equals_formula(is_causal):
  query, key, value = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4)
  keep = jnp.asarray([[True, True, True, False, False], [True] * 5])
  mask = np.broadcast_to(key_padding_mask(keep), (2, 1, 5, 5))
  expected = softmax_by_hand(query, key, value, np.tril(mask) if is_causal else mask)
  fused = jax.jit(lambda *x: attend(*x, mask=key_padding_mask(keep), is_causal=is_causal))
  given = fused(query, key, value)
  np.testing.assert_allclose(given, expected, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_intermediates_path_equals_fused(is_causal, padded):
  module = MultiHeadAttention(num_heads=2)
  x = normal(0, 2, 5, 8)
  mask = key_padding_mask(jnp.arange(5)[None] < jnp.asarray([[3], [5]])) if padded else None
  variables = variables_of(module, x)
  fused = run(module, variables, x, mask=mask, is_causal=is_causal)
  unfused, state = run(
    module, variables, x, mask=mask, is_causal=is_causal, mutable="intermediates"
  )
  np.testing.assert_allclose(fused, unfused, atol=1e-6)
  weights = state["intermediates"]["weights"][0]
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  if is_causal:
    assert not np.triu(weights, 1).any()
  if padded:
    assert not weights[0, :, :, 3:].any()


def test_cross_attention():
  """As in DETR's decoder: positions are added to queries and keys; the memory is longer."""
  module = MultiHeadAttention(num_heads=2)
  queries, memory, positions = normal(0, 2, 3, 8), normal(1, 2, 7, 8), normal(2, 2, 7, 8)
  variables = variables_of(module, queries, memory + positions, memory)
  out = run(module, variables, queries, memory + positions, memory)
  assert out.shape == (2, 3, 8)
  order = np.random.default_rng(0).permutation(7)
  shuffled = run(module, variables, queries, (memory + positions)[:, order], memory[:, order])
  np.testing.assert_allclose(out, shuffled, atol=1e-5)
  assert np.abs(out - run(module, variables, queries, memory, memory)).max() > 1e-3


def test_fully_masked_row_finite():
  module = MultiHeadAttention(num_heads=2)
  x = normal(0, 2, 4, 8)
  mask = key_padding_mask(jnp.asarray([[False] * 4, [True] * 4]))
  variables = variables_of(module, x)
  for mutable in (False, ["intermediates"]):
    out = run(module, variables, x, mask=mask, mutable=mutable)
    assert np.isfinite(jax.tree.leaves(out)[0]).all()


def test_dropout_by_loop_without_a_rate_equals_attend():
  projected = [normal(i, 3, 6, 2, 4) for i in range(3)]
  keep = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])
  mask, rng = key_padding_mask(keep), jax.random.key(4)

  def loop(*x):
    return attend_dropping(rng, 0.0, mask, *x)

  def plain(*x):
    return attend(*x, mask=mask)

  np.testing.assert_allclose(jax.jit(loop)(*projected), plain(*projected), atol=1e-6)
  losses = (lambda *x: jnp.sum(jnp.sin(loop(*x))), lambda *x: jnp.sum(jnp.sin(plain(*x))))
  for given, expected in zip(*(jax.grad(f, (0, 1, 2))(*projected) for f in losses), strict=True):
    np.testing.assert_allclose(given, expected, atol=1e-6)


def test_dropout_by_loop_drops_and_rescales_elements():
  query, key = normal(0, 2, 50, 1, 40), normal(1, 2, 40, 1, 40)
  identity = jnp.broadcast_to(jnp.eye(40)[:, None], (2, 40, 1, 40))  # the output is the map
  given = attend_dropping(jax.random.key(2), 0.25, None, query, key, identity)
  weights = attend(query, key, identity)
  np.testing.assert_allclose(given, np.where(given == 0, 0, weights / 0.75), atol=1e-6)
  dropped = np.mean(given == 0, axis=(1, 2, 3))  # of 2,000 elements in each example
  np.testing.assert_allclose(dropped, 0.25, atol=0.05)
  assert not np.array_equal(given[0] == 0, given[1] == 0)


def test_dropout_by_loop_is_the_same_on_a_mesh():
  projected, keep = [normal(i, 4, 6, 2, 4) for i in range(3)], jnp.ones((4, 6), bool)

  @jax.jit
  def loop(*x):
    return attend_dropping(jax.random.key(3), 0.5, key_padding_mask(keep), *x)

  expected = loop(*projected)
  with jax.set_mesh(create_mesh({"data": 2, "fsdp": 2, "model": 2})):
    np.testing.assert_allclose(loop(*projected), expected, atol=1e-6)


def loops(length, kind, platform):
  """Returns the number of loops in a training program for a device."""
  module = MultiHeadAttention(num_heads=2, dropout_rate=0.1)
  x = jax.ShapeDtypeStruct((2, length, 16), jnp.bfloat16)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  device = jax.sharding.AbstractDevice(kind, 1, platform)
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

  def apply(variables, x):
    return module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})

  with jax.sharding.use_abstract_mesh(mesh):
    return str(jax.make_jaxpr(apply)(variables, x)).count("scan[")


def test_dropout_by_loop_for_long_sequences_on_tpu():
  assert loops(400, "TPU v5 lite", "tpu") == 1
  assert loops(100, "TPU v5 lite", "tpu") == 0
  assert loops(400, "cpu", "cpu") == 0


def test_dropout_only_in_training():
  module = MultiHeadAttention(num_heads=2, dropout_rate=0.5)
  x = normal(0, 1, 4, 8)
  variables = variables_of(module, x)
  outs = [
    run(module, variables, x, train=True, rngs={"dropout": jax.random.key(i)}) for i in range(2)
  ]
  assert np.abs(outs[0] - outs[1]).max() > 1e-3
  np.testing.assert_array_equal(run(module, variables, x), run(module, variables, x))


def test_bfloat16_softmax_in_float32():
  query = key = value = normal(0, 1, 6, 2, 8).astype(jnp.bfloat16)
  jaxpr = str(jax.make_jaxpr(attend)(query, key, value))
  assert any("exp" in line and "f32" in line for line in jaxpr.splitlines())
  assert attend(query, key, value).dtype == jnp.bfloat16


def test_heads_not_dividing_width_raise():
  with pytest.raises(ValueError, match="num_heads: 3"):
    MultiHeadAttention(num_heads=3).init(jax.random.key(0), normal(0, 1, 2, 8))
