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


def attend_after(
  query: Float[Array, "b n h d"],
  key: Float[Array, "b n h d"],
  value: Float[Array, "b n h d"],
  past: tuple[Float[Array, "b m h d"], Float[Array, "b m h d"]],
  past_length: Int[Array, ""],
) -> Float[Array, "b n h d"]:
  """Attends causally from new positions to themselves and to those that came before.

  The past is neither copied nor extended, so that a loop can keep it in one place.

  Args:
    query: of the new positions.
    key: of the new positions.
    value: of the new positions.
    past: keys and values of earlier positions, in a buffer that may be longer than they are.
    past_length: how many of the buffer's positions are filled.
  """
  scale, length = query.shape[-1] ** -0.5, past[0].shape[1]
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  before = product("bnhd,bmhd->bhnm", query, past[0]) * scale
  filled = jnp.arange(length)[None, None, None] < past_length
  before = jnp.where(filled, before, NEGATIVE)
  among = product("bnhd,bmhd->bhnm", query, key) * scale
  causal = jnp.tril(jnp.ones((1, 1, *among.shape[2:]), dtype=bool))
  among = jnp.where(causal, among, NEGATIVE)
  weights = jax.nn.softmax(jnp.concatenate([before, among], axis=-1), axis=-1).astype(value.dtype)
  context = product("bhnm,bmhd->bnhd", weights[..., :length], past[1])
  context += product("bhnm,bmhd->bnhd", weights[..., length:], value)
  return context.astype(value.dtype)


def key_padding_mask(keep: Bool[Array, "b m"]) -> Bool[Array, "b 1 1 m"]:
  """Turns "which keys are real" into a mask that every head and query shares."""
  return keep[:, None, None, :]


class MultiHeadAttention(nn.Module):
  """Projects to heads, attends, and projects back to the width of the query's input.

  The attention map is sown as `weights` [b h n m] when the `intermediates` collection is mutable;
  then, and when attention itself has dropout, the map is computed openly instead of by the fused
  path. To decode token by token, the projected `key` and `value` [b n h d] of a call are handed out
  in the collection `present` when that is mutable, and those of earlier calls are taken from the
  collection `past`, where their owner has put them.

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
      past_length: go on after so many positions in `past`, causally; see `attend_after`.
      train: whether attention dropout is on.
    """
    keys = queries if keys is None else keys
    values = keys if values is None else values
    query = checkpoint_name(self._heads("query", queries.shape[-1])(queries), "query")
    key = checkpoint_name(self._heads("key", queries.shape[-1])(keys), "key")
    value = checkpoint_name(self._heads("value", queries.shape[-1])(values), "value")
    self._hand_out(key=key, value=value)
    if past_length is not None:
      past = (self.get_variable("past", "key"), self.get_variable("past", "value"))
      context = attend_after(query, key, value, past, past_length)
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

  def _hand_out(self, **present: Array) -> None:
    if self.is_mutable_collection("present") and not self.is_initializing():
      for name, array in present.items():
        self.put_variable("present", name, array)

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
