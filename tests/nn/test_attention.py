import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.nn.attention import MultiHeadAttention, attend, key_padding_mask


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
