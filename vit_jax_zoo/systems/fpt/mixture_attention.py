"""Attention between feature maps whose weights are a mixture of softmaxes.

Zhang et al., "Feature Pyramid Transformer", arXiv:2007.09451, section 3, after Yang et al.,
"Breaking the Softmax Bottleneck", arXiv:1711.03953: the channels of queries and keys are cut into
parts, each part compares them in a softmax of its own, and the weights are the parts' average.

Queries are taken in blocks: no matrix of all queries and all keys is ever made, and a backward pass
makes each block's weights again. Memory therefore grows with the number of positions, not with its
square, and the result is that of the plain formula: every query still sees all of its keys at once.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax_zoo.errors import unknown_name

SIMILARITIES = ("dot", "euclidean")
"""q k, or -|q - k|^2 (the grounding transformer)."""

BLOCK_ELEMENTS = 2**22
"""Entries of the attention map, over all parts, that an example may have in memory at once."""


@dataclasses.dataclass(frozen=True)
class Similarity:
  """How queries and keys are compared.

  Attributes:
    kind: one of `SIMILARITIES`.
    scale: factor of the similarity.
    dropout_rate: of each part's weights, if there is a `key`.
    key: of the dropout.
  """

  kind: str = "dot"
  scale: float = 1.0
  dropout_rate: float = 0.0
  key: Array | None = None

  def __post_init__(self) -> None:
    if self.kind not in SIMILARITIES:
      raise ValueError(unknown_name("similarity", self.kind, SIMILARITIES))


DOT_PRODUCT = Similarity()


def mixture_shares(
  vectors: Float[Array, "b m d"], weight: Float[Array, "p d"]
) -> Float[Array, "b p"]:
  """Returns each part's share in the mixture: softmax over the parts of w . mean(vectors).

  Args:
    vectors: keys in the paper, queries in its code.
    weight: one row a part, over the channels of all parts.
  """
  mean = jnp.mean(vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32)), axis=1)
  return jax.nn.softmax(mean @ weight.astype(mean.dtype).T, axis=-1)


def attention_map(
  query: Float[Array, "b n d"],
  key: Float[Array, "b m d"],
  shares: Float[Array, "b p"],
  similarity: Similarity = DOT_PRODUCT,
) -> Float[Array, "b n m"]:
  """Returns the weights that `attend` never holds together: for small maps, and for pictures.

  Args:
    query: of each position that looks.
    key: of each position that is looked at.
    shares: of the parts, `d` being a multiple of their number; rows sum to 1.
    similarity: how they are compared.
  """
  parts = shares.shape[-1]
  query, key = _split(query, parts), _split(key, parts)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum("bnpe,bmpe->bpnm", query, key, preferred_element_type=wide)
  if similarity.kind == "euclidean":
    # -|q - k|^2 without |q|^2, which all keys share and which the softmax therefore takes out.
    lengths = jnp.sum(jnp.square(key.astype(wide)), axis=-1)
    scores = 2 * scores - lengths.transpose(0, 2, 1)[:, :, None]
  weights = jax.nn.softmax(scores * similarity.scale, axis=-1)
  if similarity.key is not None and similarity.dropout_rate:
    keep = 1 - similarity.dropout_rate
    weights *= jax.random.bernoulli(similarity.key, keep, weights.shape) / keep
  return jnp.einsum("bpnm,bp->bnm", weights, shares.astype(wide))


def attend(
  query: Float[Array, "b n d"],
  key: Float[Array, "b m d"],
  value: Float[Array, "b m c"],
  shares: Float[Array, "b p"],
  similarity: Similarity = DOT_PRODUCT,
  *,
  block_elements: int = BLOCK_ELEMENTS,
) -> Float[Array, "b n c"]:
  """Returns `attention_map(...) @ value`, block by block of queries.

  Args:
    query: as in `attention_map`.
    key: likewise.
    value: what is averaged.
    shares: as in `attention_map`.
    similarity: likewise.
    block_elements: entries of the map, over all parts, in memory at once, for each example.
  """

  def of_block(block: Float[Array, "b t d"], index: Int[Array, ""]) -> Float[Array, "b t c"]:
    own = similarity
    if own.key is not None:
      own = dataclasses.replace(own, key=jax.random.fold_in(own.key, index))
    return _average(attention_map(block, key, shares, own), value)

  return in_blocks(of_block, query, key.shape[1] * shares.shape[-1], block_elements)


def attend_to_sums(
  query: Float[Array, "b n"],
  key: Float[Array, "b m"],
  value: Float[Array, "b m c"],
  *,
  block_elements: int = BLOCK_ELEMENTS,
) -> Float[Array, "b n c"]:
  """Averages values with the weights relu(q + k) / m, which need not sum to 1.

  It is the "concatenation" form of Wang et al., arXiv:1711.07971, Eq. 4: a linear map of a pair of
  vectors is the sum of one number for each.
  """

  def of_block(block: Float[Array, "b t 1"], _: Int[Array, ""]) -> Float[Array, "b t c"]:
    return _average(jax.nn.relu(block + key[:, None]) / key.shape[1], value)

  return in_blocks(of_block, query[..., None], key.shape[1], block_elements)


def in_blocks(
  function: Callable[[Array, Array], Array],
  query: Float[Array, "b n d"],
  elements_per_query: int,
  block_elements: int = BLOCK_ELEMENTS,
) -> Float[Array, "b n c"]:
  """Applies a function to blocks of positions, one after the other, and joins the results.

  Args:
    function: of [b t d] and the block's number; what it makes in between is made anew for the
      backward pass. The last block is filled up with zeros, whose results are dropped.
    query: all positions.
    elements_per_query: what the function makes in between, for each position of an example.
    block_elements: how much of that may be in memory at once.
  """
  batch, count, width = query.shape
  blocks = math.ceil(count / max(1, block_elements // elements_per_query))
  if blocks <= 1:
    return function(query, jnp.zeros((), jnp.int32))
  size = math.ceil(count / blocks)
  padded = jnp.pad(query, ((0, 0), (0, blocks * size - count), (0, 0)))
  stacked = padded.reshape(batch, blocks, size, width).swapaxes(0, 1)
  remade = jax.checkpoint(function)
  outputs = jax.lax.map(lambda pair: remade(*pair), (stacked, jnp.arange(blocks)))
  return outputs.swapaxes(0, 1).reshape(batch, blocks * size, -1)[:, :count]


def _split(x: Float[Array, "b n d"], parts: int) -> Float[Array, "b n p e"]:
  if x.shape[-1] % parts:
    raise ValueError(
      f"{x.shape[-1]} channels cannot be cut into {parts} parts; change one of the two"
    )
  return x.reshape(*x.shape[:-1], parts, -1)


def _average(weights: Float[Array, "b n m"], value: Float[Array, "b m c"]) -> Array:
  wide = jnp.promote_types(value.dtype, jnp.float32)
  averaged = jnp.einsum(
    "bnm,bmc->bnc", weights.astype(value.dtype), value, preferred_element_type=wide
  )
  return averaged.astype(value.dtype)
