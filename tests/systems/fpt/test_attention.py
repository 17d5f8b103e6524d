import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.half_precision import bfloat16_errors
from vit_jax_zoo.systems.fpt.attention import (
  Similarity,
  attend,
  attend_locally,
  attend_parts,
  attention_map,
  mixture_weights,
)


def random_arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def reference_attention_map(query, key, mixture, kind):
  """The mixture of softmax attention maps by its formula, part by part, in float64."""
  query, key, mixture = (np.asarray(x, np.float64) for x in (query, key, mixture))
  total = 0
  for part, (q, k) in enumerate(
    zip(np.split(query, mixture.shape[1], -1), np.split(key, mixture.shape[1], -1), strict=True)
  ):
    pairs = q[:, :, None] - k[:, None]
    scores = -np.square(pairs).sum(-1) if kind == "euclidean" else np.einsum("bnd,bmd->bnm", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = total + mixture[:, part, None, None] * weights / weights.sum(-1, keepdims=True)
  return total


@pytest.mark.parametrize("kind", ["dot", "euclidean"])
def test_blockwise_attention_equals_reference(kind):
  query, key, value = random_arrays((2, 23, 6), (2, 7, 6), (2, 7, 5))
  mixture = mixture_weights(key, random_arrays((3, 6))[0])
  similarity = Similarity(kind)
  expected = reference_attention_map(query, key, mixture, kind)
  np.testing.assert_allclose(attention_map(query, key, mixture, similarity), expected, atol=1e-5)

  def total(block_elements, query, key, value):
    out = attend(query, key, value, mixture, similarity, block_elements=block_elements)
    return jnp.sum(jnp.sin(out)), out

  results = [
    jax.jit(jax.value_and_grad(functools.partial(total, size), (0, 1, 2), has_aux=True))(
      query, key, value
    )
    for size in (10**6, 4 * 3 * 7)  # one block; blocks of four queries, the last of them smaller
  ]
  np.testing.assert_allclose(results[0][0][1], expected @ np.asarray(value), atol=1e-5)
  for one, other in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dot", "euclidean"])
def test_fused_kernel_equals_reference(kind):
  query, key, value = random_arrays((2, 23, 6), (2, 7, 6), (2, 7, 5))
  mixture = jnp.asarray([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]])

  def total(attention, *inputs):
    out = attention(*inputs, Similarity(kind))
    return jnp.sum(jnp.sin(out)), out

  results = [
    jax.jit(jax.value_and_grad(functools.partial(total, attention), (0, 1, 2, 3), has_aux=True))(
      query, key, value, mixture
    )
    for attention in (functools.partial(attend_parts, interpret=True), attend)
  ]
  expected = reference_attention_map(query, key, mixture, kind) @ np.asarray(value)
  np.testing.assert_allclose(results[0][0][1], expected, atol=2e-5)
  for one, other in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_fused_kernel_runs_only_on_tpu_for_many_keys_without_dropout():
  def count(keys, similarity):
    sides = ((1, 8192, 16), (1, keys, 16), (1, keys, 8), (1, 2))
    arrays = [jax.ShapeDtypeStruct(side, jnp.bfloat16) for side in sides]
    attention = functools.partial(attend, similarity=similarity)
    return str(jax.make_jaxpr(attention)(*arrays)).count("pallas_call[")

  dropped = Similarity(dropout_rate=0.1, key=jax.random.key(0))
  device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision("default"):
    assert count(8192, Similarity("euclidean")) == 1
    assert count(4096, Similarity()) == count(8192, dropped) == 0
  assert count(8192, Similarity()) == 0


def test_mixture_weights_are_softmax_of_mean_vector():
  vectors, weight = random_arrays((2, 9, 4), (3, 4))
  logits = np.asarray(vectors).mean(1) @ np.asarray(weight).T
  mixture = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(mixture_weights(vectors, weight), mixture, atol=1e-6)


def test_attention_ignores_order_of_keys():
  query, key, value = random_arrays((1, 5, 4), (1, 8, 4), (1, 8, 3))
  mixture, order = jnp.asarray([[0.3, 0.7]]), np.random.default_rng(1).permutation(8)
  run = jax.jit(attend)
  np.testing.assert_allclose(
    run(query, key, value, mixture), run(query, key[:, order], value[:, order], mixture), atol=1e-5
  )


def test_window_attention_is_local_and_zero_padded():
  query, key, value = random_arrays((1, 5, 6, 4), (1, 5, 6, 4), (1, 5, 6, 3))
  mixture = jnp.asarray([[0.5, 0.5]])
  run = jax.jit(functools.partial(attend_locally, window=3))
  out = np.asarray(run(query, key, value, mixture))
  changed = np.asarray(run(query, key.at[0, 0, 0].add(1), value.at[0, 0, 0].add(1), mixture))
  assert (np.abs(out - changed).max(-1)[0] > 0).nonzero()[0].max() == 1
  padded = [np.pad(np.asarray(x)[0], ((1, 1), (1, 1), (0, 0))) for x in (key, value)]
  for i, j in ((0, 0), (2, 3), (4, 5)):
    keys, values = (x[i : i + 3, j : j + 3].reshape(1, 9, -1) for x in padded)
    weights = reference_attention_map(query[:, i : i + 1, j], keys, mixture, "dot")
    np.testing.assert_allclose(out[0, i, j], (weights @ values)[0, 0], atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dot", "euclidean"])
def test_bfloat16_gradients_of_many_blocks_are_near_float32(kind):
  mixture = jnp.asarray([[0.3, 0.7]])
  inputs = random_arrays((1, 4096, 8), (1, 16, 8), (1, 16, 8))
  attention = functools.partial(attend, mixture=mixture, similarity=Similarity(kind))
  many = functools.partial(attention, block_elements=4 * 16 * 2)  # 1,024 blocks
  assert max(bfloat16_errors(many, *inputs)) < 0.01
  fused = functools.partial(
    attend_parts, mixture=mixture, similarity=Similarity(kind), interpret=True
  )
  assert max(bfloat16_errors(fused, *inputs)) < 0.01
  inputs = random_arrays(*[(1, 16, 16, 8)] * 3)
  local = functools.partial(attend_locally, mixture=mixture, window=15, similarity=Similarity(kind))
  assert max(bfloat16_errors(local, *inputs)) < 0.01


def gradient_bytes(count):
  """Returns the compiled temporary memory of a gradient."""
  maps = [jax.ShapeDtypeStruct((1, count, 8), jnp.float32)] * 3

  def total(*maps):
    return jnp.sum(attend(*maps, jnp.ones((1, 2)) / 2, block_elements=2**14))

  compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*maps).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_positions():
  small, large = gradient_bytes(1024), gradient_bytes(8192)
  assert large < 10 * small
  assert large < 2 * 4 * 8192**2 / 50


def test_invalid_fields_raise():
  query, key = random_arrays((1, 5, 4), (1, 8, 4))
  with pytest.raises(ValueError, match=r"4 channels .* 3 parts"):
    attention_map(query, key, jnp.ones((1, 3)))
