"""Mixture-of-softmaxes attention between feature maps: over all positions, or over a window.

arXiv:2007.09451, section 3, after Yang et al., arXiv:1711.03953: the channels of queries and keys
are split into parts with a softmax each; attention weights are a weighted mean over the parts.
"""

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax_zoo.ops.attention import attend_fused, is_fused
from vit_jax_zoo.ops.resize import resize_nearest

BLOCK_ELEMENTS = 2**22
"""Default maximum number of attention weights (all parts) in memory, per example."""

FUSED_KEYS = 2**13
"""Minimum number of keys for the fused kernel, which multiplies the values once per part. With more
keys, the gradients of the blocked form, rewritten for each block, exceed a TPU's on-chip memory."""

Queries: TypeAlias = Float[Array, "b n d"]
Keys: TypeAlias = Float[Array, "b m d"]
QueryMap: TypeAlias = Float[Array, "b h w d"]
KeyMap: TypeAlias = Float[Array, "b y x d"]
Mixture: TypeAlias = Float[Array, "b p"]  # weights of the p parts into which d channels are split


@dataclasses.dataclass(frozen=True)
class Similarity:
  """Similarity of queries and keys."""

  kind: str = "dot"  # "dot": q.k, or "euclidean": -|q - k|^2 (the grounding transformer)
  scale: float = 1.0  # factor of the similarity
  dropout_rate: float = 0.0  # of each part's weights
  key: Array | None = None  # PRNG key of the dropout; None: no dropout


DOT_PRODUCT = Similarity()


def mixture_weights(x: Keys, weight: Float[Array, "p d"]) -> Mixture:
  """Returns the mixture weights of the parts: softmax over parts of weight . mean(x).

  `x` are the keys in the paper, the queries in the official code.
  """
  mean = jnp.mean(_float32(x), axis=1)
  return jax.nn.softmax(mean @ weight.astype(mean.dtype).T, axis=-1)


def attention_map(
  query: Queries, key: Keys, mixture: Mixture, similarity: Similarity = DOT_PRODUCT
) -> Float[Array, "b n m"]:
  """Returns the full float32 attention map, which `attend` does not materialize."""
  parts = mixture.shape[-1]
  query, key = _split(query, parts), _split(key, parts)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum("bnpe,bmpe->bpnm", query, key, preferred_element_type=wide)
  if similarity.kind == "euclidean":
    # -|q - k|^2 without |q|^2, which is the same for all keys and cancels in the softmax.
    lengths = jnp.sum(jnp.square(key.astype(wide)), axis=-1)
    scores = 2 * scores - lengths.transpose(0, 2, 1)[:, :, None]
  weights = jax.nn.softmax(scores * similarity.scale, axis=-1)
  if similarity.key is not None:
    keep = 1 - similarity.dropout_rate
    weights *= jax.random.bernoulli(similarity.key, keep, weights.shape) / keep
  return jnp.einsum("bpnm,bp->bnm", weights, mixture.astype(wide))


def attend(
  query: Queries,
  key: Keys,
  value: Float[Array, "b m c"],
  mixture: Mixture,
  similarity: Similarity = DOT_PRODUCT,
  block_elements: int = BLOCK_ELEMENTS,
) -> Float[Array, "b n c"]:
  """Returns `attention_map(...) @ value`, computed in blocks of queries, or fused on TPUs.

  At most `block_elements` attention weights (all parts) are in memory, per example: the backward
  pass recomputes them. The fused kernel is for many keys without dropout.
  """
  large = key.shape[1] >= FUSED_KEYS and is_fused(query, query.shape[1], key.shape[1])
  if large and similarity.key is None:
    return attend_parts(query, key, value, mixture, similarity)

  # The gradients of key and value are sums over all blocks, which JAX accumulates in the dtype of
  # the loop's constants; bfloat16 would drop terms smaller than 1/256 of the sum.
  wide_key, wide_value = _float32(key), _float32(value)

  def of_block(block: Float[Array, "b t d"], index: Int[Array, ""]) -> Float[Array, "b t c"]:
    dropout = None if similarity.key is None else jax.random.fold_in(similarity.key, index)
    own = dataclasses.replace(similarity, key=dropout)
    weights = attention_map(block, wide_key.astype(key.dtype), mixture, own)
    weights, values = weights.astype(value.dtype), wide_value.astype(value.dtype)
    total = jnp.einsum("bnm,bmc->bnc", weights, values, preferred_element_type=wide_value.dtype)
    return total.astype(value.dtype)

  batch, count, width = query.shape
  blocks = math.ceil(count / max(1, block_elements // (key.shape[1] * mixture.shape[-1])))
  if blocks <= 1:
    return of_block(query, jnp.zeros((), jnp.int32))
  size = math.ceil(count / blocks)
  padded = jnp.pad(query, ((0, 0), (0, blocks * size - count), (0, 0)))
  stacked = padded.reshape(batch, blocks, size, width).swapaxes(0, 1)
  recomputed = jax.checkpoint(of_block)
  outputs = jax.lax.map(lambda pair: recomputed(*pair), (stacked, jnp.arange(blocks)))
  return outputs.swapaxes(0, 1).reshape(batch, blocks * size, -1)[:, :count]


def attend_parts(
  query: Queries,
  key: Keys,
  value: Float[Array, "b m c"],
  mixture: Mixture,
  similarity: Similarity,
  *,
  interpret: bool = False,
) -> Float[Array, "b n c"]:
  """Returns `attend` without dropout from the fused kernel, with the parts as heads."""
  parts = mixture.shape[-1]
  query, key = (_split(x, parts).swapaxes(1, 2) for x in (query, key))
  if similarity.kind == "euclidean":
    # 2 q.k - |k|^2 as a product: the key has |k|^2, as a sum of three bfloat16s, in more channels.
    rest, lengths = jnp.sum(jnp.square(_float32(key)), axis=-1, keepdims=True), []
    for _ in range(3):
      lengths.append(rest.astype(jnp.bfloat16).astype(key.dtype))
      rest -= _float32(lengths[-1])
    key = jnp.concatenate([key, *lengths], axis=-1)
    ones = jnp.ones((*query.shape[:-1], len(lengths)), query.dtype)
    query = jnp.concatenate([2 * query, -ones], axis=-1)
  values = jnp.broadcast_to(value[:, None], (value.shape[0], parts, *value.shape[1:]))
  each = attend_fused(query * similarity.scale, key, values, interpret=interpret)
  return jnp.einsum("bpnc,bp->bnc", each, mixture.astype(each.dtype))


def local_attention_map(
  query: QueryMap, key: KeyMap, mixture: Mixture, window: int, similarity: Similarity
) -> Float[Array, "b h w k"]:
  """Returns the attention weights over a window of keys around each query, in row-major order.

  Keys outside the map are zeros, and take part. If the maps' sizes differ, the window is centred on
  the key at the same relative position, rounded down. There is no dropout.
  """
  queries = _split(_float32(query), mixture.shape[-1])
  padded = _float32(_pad_window(key, window))

  @jax.checkpoint
  def scores(offset: Int[Array, "2"]) -> Float[Array, "b h w p"]:
    keys = _at_offset(padded, offset, window, query.shape[1:3]).reshape(queries.shape)
    products = jnp.sum(queries * keys, axis=-1)
    if similarity.kind == "euclidean":
      products = 2 * products - jnp.sum(jnp.square(keys), axis=-1)
    return products * similarity.scale

  # One offset of all windows at a time: no array holds a window of channels per position.
  offsets = jnp.indices((window, window)).reshape(2, -1).T
  weights = jax.nn.softmax(jax.lax.map(scores, offsets), axis=0)
  return jnp.einsum("kbhwp,bp->bhwk", weights, mixture.astype(weights.dtype))


def attend_locally(
  query: QueryMap,
  key: KeyMap,
  value: Float[Array, "b y x c"],
  mixture: Mixture,
  window: int,
  similarity: Similarity = DOT_PRODUCT,
) -> Float[Array, "b h w c"]:
  """Returns the values in each query's window, weighted by `local_attention_map`."""
  weights = local_attention_map(query, key, mixture, window, similarity)
  by_offset = jnp.moveaxis(weights, -1, 0)[..., None]
  padded = _float32(_pad_window(value, window))

  @jax.checkpoint
  def add(total: Array, x: tuple[Array, Array]) -> tuple[Array, None]:
    offset, weight = x
    return total + weight * _at_offset(padded, offset, window, query.shape[1:3]), None

  zeros = jnp.zeros((*query.shape[:3], value.shape[-1]), padded.dtype)
  offsets = jnp.indices((window, window)).reshape(2, -1).T
  total, _ = jax.lax.scan(add, zeros, (offsets, by_offset))
  return total.astype(value.dtype)


def _float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _split(x: Float[Array, "*b d"], parts: int) -> Float[Array, "*b p e"]:
  if x.shape[-1] % parts:
    raise ValueError(f"{x.shape[-1]} channels cannot be split into {parts} parts; change either")
  return x.reshape(*x.shape[:-1], parts, -1)


def _pad_window(x: Float[Array, "b y x c"], window: int) -> Float[Array, "b i j c"]:
  if window < 1 or window % 2 == 0:
    raise ValueError(f"window: {window} is not a positive odd number")
  for axis in (1, 2):  # not jnp.pad, which jax2onnx cannot convert for symbolic batch sizes
    border = jnp.zeros((*x.shape[:axis], window // 2, *x.shape[axis + 1 :]), x.dtype)
    x = jnp.concatenate([border, x, border], axis)
  return x


def _at_offset(
  padded: Float[Array, "b i j c"], offset: Int[Array, "2"], window: int, size: tuple[int, ...]
) -> Float[Array, "b h w c"]:
  start = (0, offset[0], offset[1], 0)
  sides = (padded.shape[1] - window + 1, padded.shape[2] - window + 1)
  part = jax.lax.dynamic_slice(padded, start, (padded.shape[0], *sides, padded.shape[-1]))
  return resize_nearest(part, (size[0], size[1]))
