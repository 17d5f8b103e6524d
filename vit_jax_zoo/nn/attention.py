"""Multi-head attention. Attention Is All You Need, arXiv:1706.03762, section 3.2."""

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.attention import MASKED, attend_fused, attend_on_cpu, is_fused, matrix_product
from vit_jax_zoo.ops.sharding import is_for_cpu, on_own_examples

Implementation: TypeAlias = Literal["xla", "cudnn"] | None
"""None: `ops.attention` on CPUs, and on TPUs for long sequences; otherwise JAX's default. "xla" and
"cudnn" (fused kernel for NVIDIA GPUs, 16-bit inputs only): of `jax.nn.dot_product_attention`."""

Queries: TypeAlias = Float[Array, "b n h d"]
Keys: TypeAlias = Float[Array, "b m h d"]
Cached: TypeAlias = Float[Array, "b*h m d"]  # the layout of `heads_first`
Mask: TypeAlias = Bool[Array, "#b #h #n #m"]  # True where a query attends to a key


def attend(
  query: Queries,
  key: Keys,
  value: Keys,
  *,
  mask: Mask | None = None,
  is_causal: bool = False,
  implementation: Implementation = None,
) -> Float[Array, "b n h d"]:
  """Returns softmax(query key^T / sqrt(d)) value for each head; the softmax is in float32.

  `is_causal` also masks keys after the query.
  """
  if implementation is None and is_for_cpu():
    mask = _add_causal(mask, query, key) if is_causal else mask
    return attend_on_cpu(*(x.swapaxes(1, 2) for x in (query, key, value)), mask).swapaxes(1, 2)
  masks_keys = mask is None or mask.shape[1:3] == (1, 1)  # as of `key_padding_mask`
  if implementation is None and masks_keys and is_fused(query, query.shape[1], key.shape[1]):
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    keep = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], (len(key), key.shape[2]))
    return attend_fused(query, key, value, keep, is_causal=is_causal).swapaxes(1, 2)
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, is_causal=is_causal, implementation=implementation
  )


def attention_weights(
  query: Queries, key: Keys, *, mask: Mask | None = None, is_causal: bool = False
) -> Float[Array, "b h n m"]:
  """Returns the attention map in float32, which `attend` does not return."""
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
  mask = _add_causal(mask, query, key) if is_causal else mask
  return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, MASKED), axis=-1)


def attend_dropping(
  rng: jax.Array, rate: float, mask: Mask | None, *projected: Float[Array, "b _ h d"]
) -> Float[Array, "b n h d"]:
  """Returns `attend` of query, key and value with dropout of the map's elements.

  A loop over images, whose maps fit into a TPU's on-chip memory; the backward pass repeats them.
  """

  def one_image(inputs: Any) -> Float[Array, "n h d"]:
    rng, mask, query, key, value = jax.tree.map(lambda x: x[None], inputs)
    weights = attention_weights(query, key, mask=mask)
    kept = jax.random.bernoulli(rng[0], 1 - rate, weights.shape)
    weights = jnp.where(kept, weights / (1 - rate), 0).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)[0]

  loop = functools.partial(jax.lax.map, jax.checkpoint(one_image, prevent_cse=False))
  keys = jax.random.split(rng, len(projected[0]))
  mask = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
  mask = jnp.broadcast_to(mask, (len(keys), *mask.shape[1:]))
  return on_own_examples(lambda *inputs: loop(inputs), keys, mask, *projected)


def _add_causal(mask: Array | None, query: Array, key: Array) -> Bool[Array, "#b #h n m"]:
  causal = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
  return causal if mask is None else mask & causal


def heads_first(x: Queries) -> Float[Array, "b*h n d"]:
  """Returns the cache's layout; with others, XLA on CPUs copies the cache for each product."""
  return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def attend_cached(
  query: Queries, key: Cached, value: Cached, past_length: Int[Array, ""]
) -> Float[Array, "b n h d"]:
  """Attends causally from new positions, the first at `past_length`, up to themselves."""
  batch, new, heads, width = query.shape
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product("snd,smd->snm", heads_first(query), key) * width**-0.5
  own = past_length + jnp.arange(new, dtype=past_length.dtype)
  before = jnp.arange(key.shape[1], dtype=own.dtype)[None, None] <= own[None, :, None]
  scores = jnp.where(before, scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  context = product("snm,smd->snd", weights, value).astype(value.dtype)
  return context.reshape(batch, heads, new, width).swapaxes(1, 2)


def key_padding_mask(keep: Bool[Array, "b m"]) -> Bool[Array, "b 1 1 m"]:
  """Returns the mask of real keys, broadcast over heads and queries."""
  return keep[:, None, None, :]


class MultiHeadAttention(nn.Module):
  """Projects to heads, attends, and projects back to the width of the queries.

  If the collection `intermediates` is mutable, the attention map is sown as `weights` [b h n m].
  Then, and with its dropout except on long sequences on TPUs, the map is in main memory. If the
  collection `cache` is mutable, the projected `key` and `value` are stored in it in the layout of
  `heads_first`; a call with `past_length` appends to them.
  """

  num_heads: int  # must divide the width
  qkv_bias: bool = True  # whether query, key and value have biases
  out_bias: bool = True  # whether the output projection has one
  dropout_rate: float = 0.0  # of the attention map, while training
  kernel_init: Initializer = nn.initializers.xavier_uniform()  # as width x width matrices
  out_kernel_init: Initializer | None = None  # of the output projection; None: `kernel_init`
  dtype: Dtype = jnp.float32  # of the computation; softmax and parameters are in float32
  implementation: Implementation = None

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, "b n d"],
    keys: Float[Array, "b m e"] | None = None,
    values: Float[Array, "b m f"] | None = None,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    past_length: Int[Array, ""] | None = None,
    train: bool = False,
  ) -> Float[Array, "b n d"]:
    """Attends from `queries` to `keys` (default: `queries`), averaging `values` (default: `keys`).

    `mask` and `is_causal` are as in `attend`; `past_length` is the number of positions in `cache`,
    after which to continue causally; `train` enables attention dropout.
    """
    keys = queries if keys is None else keys
    values = keys if values is None else values
    width = queries.shape[-1]
    if width % self.num_heads:
      raise ValueError(f"num_heads: {self.num_heads}; expected a divisor of the width {width}")
    heads = (self.num_heads, width // self.num_heads)
    project = functools.partial(self._dense, use_bias=self.qkv_bias, kernel_init=self.kernel_init)
    query = checkpoint_name(project(heads, name="query")(queries), "query")
    key = checkpoint_name(project(heads, name="key")(keys), "key")
    value = checkpoint_name(project(heads, name="value")(values), "value")
    cached = self._cache(past_length, key=key, value=value)
    masked: dict[str, Any] = {"mask": mask, "is_causal": is_causal}
    sows, drops = self.is_mutable_collection("intermediates"), train and self.dropout_rate
    if past_length is not None:
      context = attend_cached(query, **cached, past_length=past_length)
    elif drops and not (sows or is_causal) and is_fused(query, query.shape[1], key.shape[1]):
      rng = self.make_rng("dropout")
      context = attend_dropping(rng, self.dropout_rate, mask, query, key, value)
    elif sows or drops:
      weights = attention_weights(query, key, **masked)
      self.sow("intermediates", "weights", weights)
      weights = nn.Dropout(self.dropout_rate)(weights, deterministic=not train)
      context = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(value.dtype), value)
    else:
      context = attend(query, key, value, **masked, implementation=self.implementation)
    fields = {"use_bias": self.out_bias, "kernel_init": self.out_kernel_init or self.kernel_init}
    out = self._dense(width, axis=(-2, -1), **fields, name="out")(context)
    return checkpoint_name(out, "attention_out")

  def _cache(self, past_length: Int[Array, ""] | None, **new: Array) -> dict[str, Array]:
    """Writes keys and values to the cache before they are read; otherwise XLA copies the cache."""
    arrays = {name: heads_first(x) for name, x in new.items()}
    if past_length is not None:
      update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
      arrays = {k: update(self.get_variable("cache", k), x, past_length) for k, x in arrays.items()}
    if self.is_mutable_collection("cache") and not self.is_initializing():
      for name, array in arrays.items():
        self.put_variable("cache", name, array)
    return arrays

  def _dense(self, features: int | tuple[int, int], **fields: Any) -> nn.DenseGeneral:
    dot_general = matrix_product if is_for_cpu() else None
    return nn.DenseGeneral(features, **fields, dtype=self.dtype, dot_general=dot_general)
