"""Multi-head attention. Attention Is All You Need, arXiv:1706.03762, section 3.2.

One module for encoders (one input), causal decoders (`is_causal`, with a cache), and attention with
position embeddings in queries and keys but not in values (three inputs).
"""

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.attention import matrix_product
from vit_jax_zoo.ops.sharding import is_for_cpu

Implementation: TypeAlias = Literal["xla", "cudnn"] | None
"""Of `jax.nn.dot_product_attention`: None is JAX's choice, "xla" runs everywhere, "cudnn" is the
fused kernel of NVIDIA GPUs (16-bit inputs only)."""

NEGATIVE = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a masked pair: finite, so that a row without any key gives no NaN."""


def attend(
  query: Float[Array, "b n h d"],
  key: Float[Array, "b m h d"],
  value: Float[Array, "b m h d"],
  *,
  mask: Bool[Array, "#b #h #n #m"] | None = None,
  is_causal: bool = False,
  implementation: Implementation = None,
) -> Float[Array, "b n h d"]:
  """Returns softmax(query key^T / sqrt(d)) value for each head; the softmax is in float32.

  Args:
    query: one vector per position and head.
    key: as `query`.
    value: as `query`.
    mask: True where a query attends to a key.
    is_causal: also masks keys after the query's position.
    implementation: see `Implementation`.
  """
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, is_causal=is_causal, implementation=implementation
  )


def attention_weights(
  query: Float[Array, "b n h d"],
  key: Float[Array, "b m h d"],
  *,
  mask: Bool[Array, "#b #h #n #m"] | None = None,
  is_causal: bool = False,
) -> Float[Array, "b h n m"]:
  """Returns the attention map in float32, which `attend` does not materialise."""
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
  if is_causal:
    causal = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), dtype=bool))
    mask = causal if mask is None else mask & causal
  if mask is not None:
    scores = jnp.where(mask, scores, NEGATIVE)
  return jax.nn.softmax(scores, axis=-1)


def heads_first(x: Float[Array, "b n h d"]) -> Float[Array, "b*h n d"]:
  """Returns the layout of the cache: batch and heads in one axis, before the positions.

  It is the only batch dimension of the two products in `attend_cached`. With two, or in another
  order, XLA on a CPU copies the whole cache for each product at each step.
  """
  return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def attend_cached(
  query: Float[Array, "b n h d"],
  key: Float[Array, "b*h m d"],
  value: Float[Array, "b*h m d"],
  past_length: Int[Array, ""],
) -> Float[Array, "b n h d"]:
  """Attends causally from new positions to all positions up to themselves.

  Args:
    query: of the new positions.
    key: of all positions, in a buffer that may be longer; see `heads_first`.
    value: as `key`.
    past_length: index of the first new position in the buffer.
  """
  batch, new, heads, width = query.shape
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product("snd,smd->snm", heads_first(query), key) * width**-0.5
  own = past_length + jnp.arange(new)
  before = jnp.arange(key.shape[1])[None, None] <= own[None, :, None]
  scores = jnp.where(before, scores, NEGATIVE)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  context = product("snm,smd->snd", weights, value).astype(value.dtype)
  return context.reshape(batch, heads, new, width).swapaxes(1, 2)


def key_padding_mask(keep: Bool[Array, "b m"]) -> Bool[Array, "b 1 1 m"]:
  """Returns the mask of real keys, broadcast over heads and queries."""
  return keep[:, None, None, :]


class MultiHeadAttention(nn.Module):
  """Projects to heads, attends, and projects back to the width of the queries.

  If the collection `intermediates` is mutable, the attention map is sown as `weights` [b h n m];
  then, and with attention dropout, the fused path is not used. If the collection `cache` is
  mutable, the projected `key` and `value` are stored in it in the layout of `heads_first`; a call
  with `past_length` appends to them.

  Attributes:
    num_heads: must divide the width.
    qkv_bias: whether query, key and value have biases.
    out_bias: whether the output projection has one.
    dropout_rate: of the attention map, while training.
    kernel_init: of all four projections, as width x width matrices.
    out_kernel_init: of the output projection; None: `kernel_init`.
    dtype: of the computation; the softmax is in float32 and parameters stay float32.
    implementation: see `Implementation`.
  """

  num_heads: int
  qkv_bias: bool = True
  out_bias: bool = True
  dropout_rate: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  out_kernel_init: nn.initializers.Initializer | None = None
  dtype: Dtype = jnp.float32
  implementation: Implementation = None

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, "b n d"],
    keys: Float[Array, "b m e"] | None = None,
    values: Float[Array, "b m f"] | None = None,
    *,
    mask: Bool[Array, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
    past_length: Int[Array, ""] | None = None,
    train: bool = False,
  ) -> Float[Array, "b n d"]:
    """Attends from `queries` to `keys`, averaging `values`.

    Args:
      queries: input of the query projection.
      keys: input of the key projection; `queries` if None.
      values: input of the value projection; `keys` if None.
      mask: True where a query attends to a key.
      is_causal: also masks keys after the query's position.
      past_length: number of positions in `cache`, after which to continue causally.
      train: enables attention dropout.
    """
    keys = queries if keys is None else keys
    values = keys if values is None else values
    query = checkpoint_name(self._heads("query", queries.shape[-1])(queries), "query")
    key = checkpoint_name(self._heads("key", queries.shape[-1])(keys), "key")
    value = checkpoint_name(self._heads("value", queries.shape[-1])(values), "value")
    cached = self._keep(past_length, key=key, value=value)
    if past_length is not None:
      context = attend_cached(query, **cached, past_length=past_length)
    elif self.is_mutable_collection("intermediates") or (train and self.dropout_rate):
      weights = attention_weights(query, key, mask=mask, is_causal=is_causal)
      self.sow("intermediates", "weights", weights)
      weights = nn.Dropout(self.dropout_rate)(weights, deterministic=not train)
      context = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(value.dtype), value)
    else:
      context = attend(
        query, key, value, mask=mask, is_causal=is_causal, implementation=self.implementation
      )
    out = nn.DenseGeneral(
      queries.shape[-1],
      axis=(-2, -1),
      use_bias=self.out_bias,
      kernel_init=self.out_kernel_init or self.kernel_init,
      dtype=self.dtype,
      dot_general=matrix_product if is_for_cpu() else None,
      name="out",
    )(context)
    return checkpoint_name(out, "attention_out")

  def _keep(self, past_length: Int[Array, ""] | None, **new: Array) -> dict[str, Array]:
    """Writes keys and values to the cache, and returns its content.

    Written before they are read: otherwise XLA copies the cache.
    """
    kept = {name: heads_first(x) for name, x in new.items()}
    if past_length is not None:
      place = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
      kept = {k: place(self.get_variable("cache", k), x, past_length) for k, x in kept.items()}
    if self.is_mutable_collection("cache") and not self.is_initializing():
      for name, array in kept.items():
        self.put_variable("cache", name, array)
    return kept

  def _heads(self, name: str, width: int) -> nn.Module:
    if width % self.num_heads:
      raise ValueError(f"num_heads: {self.num_heads}; expected a divisor of the width {width}")
    return nn.DenseGeneral(
      (self.num_heads, width // self.num_heads),
      use_bias=self.qkv_bias,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      dot_general=matrix_product if is_for_cpu() else None,
      name=name,
    )
