"""Multi-head attention, through one function for the dot product.

Attention Is All You Need, arXiv:1706.03762, section 3.2. Every Transformer of the package attends
with `MultiHeadAttention`: encoders (one input), causal decoders (`is_causal`), and cross-attention
whose queries and keys carry positions that the values do not (three inputs).
"""

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

Implementation: TypeAlias = Literal["xla", "cudnn"] | None
"""What `jax.nn.dot_product_attention` takes: None leaves the choice to JAX, "xla" runs everywhere,
"cudnn" is the fused kernel of NVIDIA GPUs (16-bit inputs only)."""

NEGATIVE = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a pair that must not attend: finite, so that a row without any key gives no NaN."""


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
    query: one vector for each position and head.
    key: what queries are compared with.
    value: what is averaged.
    mask: True where a query may look at a key.
    is_causal: also hides keys after the query's own position.
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
  """Returns the attention map itself, in float32: what `attend` never writes to memory."""
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
  if is_causal:
    causal = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), dtype=bool))
    mask = causal if mask is None else mask & causal
  if mask is not None:
    scores = jnp.where(mask, scores, NEGATIVE)
  return jax.nn.softmax(scores, axis=-1)


def heads_first(x: Float[Array, "b n h d"]) -> Float[Array, "b*h n d"]:
  """Returns the vectors of each image's heads one after the other: the layout of a cache.

  Batch and heads are one axis, since that is the one batch dimension of the two products in
  `attend_cached`. With two, or in another order, XLA on a CPU copies the whole cache for each of
  them at each step.
  """
  return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def attend_cached(
  query: Float[Array, "b n h d"],
  key: Float[Array, "b*h m d"],
  value: Float[Array, "b*h m d"],
  past_length: Int[Array, ""],
) -> Float[Array, "b n h d"]:
  """Attends causally from new positions to themselves and to those that came before.

  Args:
    query: of the new positions.
    key: of all positions, in a buffer that may be longer than they are; see `heads_first`.
    value: likewise.
    past_length: the place of the first new position in the buffer.
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
  """Turns "which keys are real" into a mask that every head and query shares."""
  return keep[:, None, None, :]


class MultiHeadAttention(nn.Module):
  """Projects to heads, attends, and projects back to the width of the query's input.

  The attention map is sown as `weights` [b h n m] when the `intermediates` collection is mutable;
  then, and when attention itself has dropout, the map is computed openly instead of by the fused
  path. To decode token by token, the projected `key` and `value` of a call are kept in the
  collection `cache` when that is mutable, laid out by `heads_first`; a call with `past_length` adds
  its own to those that are there.

  Attributes:
    num_heads: must divide the width.
    qkv_bias: whether query, key and value have biases.
    out_bias: whether the output projection has one.
    dropout_rate: of the attention map, while training.
    kernel_init: of all four projections, as matrices of width x width.
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
      mask: True where a query may look at a key.
      is_causal: also hides keys after the query's own position.
      past_length: go on after so many positions of `cache`, causally; see `attend_cached`.
      train: whether attention dropout is on.
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
      name="out",
    )(context)
    return checkpoint_name(out, "attention_out")

  def _keep(self, past_length: Int[Array, ""] | None, **new: Array) -> dict[str, Array]:
    """Returns keys and values by name as the cache holds them, now that it holds the new ones.

    They are written before they are read: otherwise XLA copies the cache, to write to the copy.
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
      raise ValueError(
        f"width {width} is not a multiple of num_heads {self.num_heads}; change one of them"
      )
    return nn.DenseGeneral(
      (self.num_heads, width // self.num_heads),
      use_bias=self.qkv_bias,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name=name,
    )
