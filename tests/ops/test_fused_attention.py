"""The fused kernel, interpreted on CPU, against the formula; conditions for its use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.nn.attention import MultiHeadAttention, attend, key_padding_mask
from vit_jax_zoo.ops import attention as fused_attention
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.training.sharding import create_mesh

TPU = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
interpreted = functools.partial(fused_attention.attend_fused, interpret=True)


def arrays_of(shape, queries, dtype="float32"):
  """Returns scaled queries, keys, values with half as many channels, and output weights."""
  batch, heads, keys, width = shape
  sides = ((queries, width), (keys, width), (keys, width // 2), (queries, width // 2))
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=(batch, heads, *side)), dtype) for side in sides]
  return [(arrays[0] * width**-0.5).astype(dtype), *arrays[1:]]


def formula(query, key, value, keep=None, *, is_causal=False):
  scores = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
  mask = jnp.ones(scores.shape, bool) if keep is None else keep[:, None, None]
  mask = jnp.tril(jnp.broadcast_to(mask, scores.shape)) if is_causal else mask
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
  return jnp.einsum("bhnm,bhmc->bhnc", weights, value.astype(jnp.float32))


def value_and_gradients(function, arrays, **kwargs):
  def loss(*inputs):
    out = function(*inputs, **kwargs).astype(jnp.float32)
    return jnp.sum(jnp.sin(out) * arrays[-1]), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays[:-1])
  return [out, *gradients]


@pytest.mark.parametrize(
  ("queries", "keys", "block", "is_causal", "padded", "dtype"),
  [
    (130, 600, 256, False, True, "float32"),  # five blocks of keys: two backward kernels
    (300, 300, 512, True, False, "float32"),  # two blocks, two products each
    (200, 100, 128, False, False, "bfloat16"),
  ],
)
def test_values_and_gradients_equal_formula(
  queries, keys, block, is_causal, padded, dtype, monkeypatch
):
  monkeypatch.setattr(fused_attention, "MAX_BLOCK", block)
  monkeypatch.setattr(fused_attention, "MAX_COMPUTE", 128)
  arrays = arrays_of((2, 1, keys, 24), queries, dtype)
  keep = jnp.asarray(np.arange(keys) < [[7], [keys]]) if padded else None
  found = value_and_gradients(interpreted, arrays, keep=keep, is_causal=is_causal)
  expected = value_and_gradients(formula, arrays, keep=keep, is_causal=is_causal)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape
    atol = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol)


@pytest.mark.multidevice
def test_sharded_over_examples_and_heads():
  mesh = create_mesh({"data": 2, "fsdp": 2, "model": 2})
  *arrays, _ = arrays_of((4, 2, 128, 16), 128)
  keep = jnp.asarray(np.arange(128) < [[9], [50], [128], [1]])
  with jax.set_mesh(mesh):
    found = jax.jit(interpreted)(*arrays, keep)
  assert found.sharding.spec == jax.P(("data", "fsdp"), "model")
  np.testing.assert_allclose(found, formula(*arrays, keep), atol=1e-5)


def kernels(function, *arrays, device=TPU, precision="default"):
  """Returns the number of Pallas kernels in a program for a device."""
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
    return str(jax.make_jaxpr(function)(*arrays)).count("pallas_call[")


def test_kernel_used_for_long_sequences_on_tpu():
  x = jax.ShapeDtypeStruct((2, 512, 2, 16), jnp.bfloat16)
  mask = key_padding_mask(jnp.ones((2, 512), bool))
  assert kernels(attend, x, x, x) == 1
  assert kernels(functools.partial(attend, mask=mask, is_causal=True), x, x, x) == 1
  assert kernels(functools.partial(attend, implementation="xla"), x, x, x) == 0
  assert kernels(functools.partial(attend, mask=jnp.ones((1, 1, 512, 512), bool)), x, x, x) == 0
  for kind, platform in (("cpu", "cpu"), ("TPU v3", "tpu")):  # v3 has no bfloat16 kernel
    device = jax.sharding.AbstractDevice(kind, 1, platform)
    assert kernels(attend, x, x, x, device=device) == 0
  assert kernels(attend, x, x, x, precision="highest") == 0
  short = jax.ShapeDtypeStruct((2, 197, 2, 16), jnp.bfloat16)
  assert kernels(attend, short, x, x) == kernels(attend, x, short, short) == 0
  assert str(jax.make_jaxpr(attend)(x, x, x)).count("pallas_call[") == 0  # outside a mesh


def test_dropout_uses_unfused_attention():
  module, x = MultiHeadAttention(2, dropout_rate=0.1), jax.ShapeDtypeStruct((1, 512, 32), "float32")
  variables = jax.eval_shape(module.init, jax.random.key(0), x)

  def run(variables, x, *, train):
    return module.apply(variables, x, train=train, rngs={"dropout": jax.random.key(1)})

  assert kernels(functools.partial(run, train=False), variables, x) == 1
  assert kernels(functools.partial(run, train=True), variables, x) == 0


def test_kernel_flops():
  x = jax.ShapeDtypeStruct((3, 2, 2048, 64), jnp.bfloat16)  # two blocks of queries and of keys
  product = 3 * 2 * 2 * 2048 * 2048 * 64
  assert count_flops(fused_attention.attend_fused, x, x, x) == 2 * product
  gradients = jax.grad(lambda *x: jnp.sum(fused_attention.attend_fused(*x)), (0, 1, 2))
  di = 3 * 2 * 2 * 2048 * 64  # the output times its gradient, summed over channels
  assert (
    count_flops(gradients, x, x, x) == (2 + 5) * product + di
  )  # the attention map is recomputed
