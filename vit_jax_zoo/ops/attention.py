"""Attention for CPUs and TPUs, and dense layers in the form that XLA runs fastest on CPUs.

On CPUs, results are those of `jax.nn.dot_product_attention` and `jax.lax.dot_general`, except for
rounding. On TPUs, JAX's splash attention kernel (Pallas) runs on each device's own part: no
attention map is in main memory, forward or backward (FlashAttention, arXiv:2205.14135).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from vit_jax_zoo.ops.sharding import splitting_axes

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a masked pair: finite, so that a row without any key gives no NaN."""


def matrix_product(
  x: Float[Array, "..."], kernel: Float[Array, "..."], dimension_numbers: Any, **options: Any
) -> Float[Array, "..."]:
  """A `dot_general` for `nn.Dense` and `nn.DenseGeneral` as a product of two matrices.

  For products of more dimensions, XLA on CPUs copies and transposes operands and gradients.
  """
  count = len(dimension_numbers[0][0])  # Linen contracts the last axes of x with the kernel's first
  inner = math.prod(kernel.shape[:count])
  out = jax.lax.dot(x.reshape(-1, inner), kernel.reshape(inner, -1), **options)
  return out.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:])


@jax.custom_vjp
def attend_on_cpu(
  query: Float[Array, "b h n d"],
  key: Float[Array, "b h m d"],
  value: Float[Array, "b h m d"],
  mask: Bool[Array, "#b #h #n #m"] | None,
) -> Float[Array, "b h n d"]:
  """Returns softmax(query key^T / sqrt(d)) value, with a backward pass that keeps the softmax."""
  return _forward(query, key, value, mask)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> Any:
  scores = _product("snd,smd->snm", query, key) * query.shape[-1] ** -0.5
  if mask is not None:
    scores = jnp.where(mask, scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1)
  out = _product("snm,smd->snd", weights.astype(value.dtype), value).astype(value.dtype)
  return out, (query, key, value, mask, weights, out)


def _backward(kept: Any, gradient: jax.Array) -> Any:
  query, key, value, mask, weights, out = kept
  of_value = _product("snm,snd->smd", weights.astype(value.dtype), gradient)
  of_weights = _product("snd,smd->snm", gradient, value)
  inner = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
  of_scores = weights * (of_weights - inner) * query.shape[-1] ** -0.5
  if mask is not None:  # the weights of a row without any key are not 0
    of_scores = jnp.where(mask, of_scores, 0)
  of_scores = of_scores.astype(query.dtype)
  of_query = _product("snm,smd->snd", of_scores, key).astype(query.dtype)
  of_key = _product("snm,snd->smd", of_scores, query).astype(key.dtype)
  return of_query, of_key, of_value.astype(value.dtype), None


attend_on_cpu.defvjp(_forward, _backward)


def _product(formula: str, a: Float[Array, "b h _ _"], b: Float[Array, "b h _ _"]) -> jax.Array:
  """Returns the products of all batches and heads, flattened to one axis, in float32."""
  flat = (x.reshape(-1, *x.shape[2:]) for x in (a, b))
  out = jnp.einsum(formula, *flat, preferred_element_type=jnp.float32)
  return out.reshape(*a.shape[:2], *out.shape[1:])


MIN_LENGTH = 384  # queries and keys from which the kernel is faster (benchmarks/README.md)
MAX_BLOCK = 1024  # queries, and keys, in on-chip memory at a time, in 16 bits; in 32 half as many
MAX_COMPUTE = 512  # keys per matrix product
MAX_PARTIAL = 4  # gradients of the query in memory, one for each block of keys


def is_fused(query: Float[Array, "b ..."], queries: int, keys: int) -> bool:
  """Returns whether to use the kernel: long sequences on a mesh (`jax.set_mesh`) of TPUs from v4.

  False without a mesh or for a symbolic batch size, as the program may be for several platforms,
  and in 16 bits with a higher `jax_default_matmul_precision`, which the kernel does not support.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None or device.platform != "tpu" or device.device_kind in ("TPU v2", "TPU v3"):
    return False
  precision = jax.config.jax_default_matmul_precision  # pyrefly: ignore[missing-attribute]
  has_precision = query.dtype == jnp.float32 or precision in (None, "default", "bfloat16")
  return min(queries, keys) >= MIN_LENGTH and has_precision and isinstance(query.shape[0], int)


def attend_fused(
  query: Float[Array, "b h n d"],
  key: Float[Array, "b h m d"],
  value: Float[Array, "b h m c"],
  keep: Bool[Array, "b m"] | None = None,
  *,
  is_causal: bool = False,
  interpret: bool = False,
) -> Float[Array, "b h n c"]:
  """Returns softmax(query key^T) value, the softmax in float32; scale the query beforehand.

  `keep` is True for the keys that are attended to; without any, the weights are equal. `interpret`
  runs the kernel on CPUs, for tests.
  """
  attend = functools.partial(_attend, is_causal=is_causal, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return attend(query, key, value, keep)
  # XLA cannot partition a kernel: each device runs its examples, and its heads on the axis `model`.
  batch = PartitionSpec(splitting_axes(query.shape[0]) or None)
  ways = mesh.shape.get("model", 1)
  split = PartitionSpec(*batch, None if query.shape[1] % ways else "model" if ways > 1 else None)
  in_specs = (split, split, split, batch)
  mapped = jax.shard_map(attend, in_specs=in_specs, out_specs=split, check_vma=False)
  return mapped(query, key, value, keep)


def _attend(
  query: Array, key: Array, value: Array, keep: Array | None, *, is_causal: bool, interpret: bool
) -> Array:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

  heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
  block_q, block_k = (_block(n, 2 * MAX_BLOCK // query.dtype.itemsize) for n in (queries, keys))
  compute = max(size for size in range(128, MAX_COMPUTE + 1, 128) if block_k % size == 0)
  query, key, value = (
    _pad(x, 2, block) for x, block in ((query, block_q), (key, block_k), (value, block_k))
  )
  # One backward kernel writes a query gradient per block of keys; two compute the map twice.
  one_kernel = key.shape[2] <= MAX_PARTIAL * block_k
  sizes = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_kv_compute=compute,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    block_kv_dkv_compute=compute,
    block_q_dq=None if one_kernel else block_q,
    block_kv_dq=None if one_kernel else block_k,
    use_fused_bwd_kernel=one_kernel,
  )
  kind = splash.CausalMask if is_causal else splash.FullMask
  mask = splash.MultiHeadMask([kind((query.shape[2], key.shape[2]))] * heads)
  kernel: Any = splash.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
  )
  # Causal attention does not reach the padding, except in rows that are cut off.
  if keep is None and key.shape[2] > keys and not (is_causal and queries <= keys):
    keep = jnp.ones((len(query), keys), bool)
  segments = None
  if keep is not None:
    of_keys = _pad(keep.astype(jnp.int32), 1, block_k)
    segments = splash.SegmentIds(jnp.ones((len(query), query.shape[2]), jnp.int32), of_keys)
  return jax.vmap(kernel)(query, key, value, segments)[:, :, :queries]


def _block(length: int, limit: int) -> int:
  """Returns the block size, a multiple of 128, with the fewest blocks of at most `limit`."""
  blocks = -(-length // limit)
  return -(-length // (128 * blocks)) * 128


def _pad(x: Array, axis: int, multiple: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)
