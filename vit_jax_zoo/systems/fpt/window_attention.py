"""Attention to a window around each position: what the positions of a map see of their neighbours.

Windows are walked through place by place, so that no array holds a window's worth of channels for
every position. Places beyond the border are zeros, and take part.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax_zoo.ops.resize import resize_nearest
from vit_jax_zoo.systems.fpt.mixture_attention import DOT_PRODUCT, Similarity


def local_attention_map(
  query: Float[Array, "b h w d"],
  key: Float[Array, "b y x d"],
  shares: Float[Array, "b p"],
  window: int,
  similarity: Similarity = DOT_PRODUCT,
) -> Float[Array, "b h w k"]:
  """Returns the weights of a window's places, row by row: a mixture of softmaxes.

  Args:
    query: of each position that looks.
    key: of each position that is looked at. Where that map has other sides, a window's middle is
      the position at the same share of the sides, rounded down.
    shares: of the parts, as in `mixture_attention.attention_map`.
    window: side of the window, odd.
    similarity: how queries and keys are compared; without dropout.
  """
  parts, size = shares.shape[-1], (query.shape[1], query.shape[2])
  wide = jnp.promote_types(query.dtype, jnp.float32)
  query_parts = query.astype(wide).reshape(*query.shape[:-1], parts, -1)

  def scores(place: Float[Array, "b h w d"]) -> Float[Array, "b h w p"]:
    place_parts = place.astype(wide).reshape(query_parts.shape)
    product = jnp.sum(query_parts * place_parts, axis=-1)
    if similarity.kind == "euclidean":
      product = 2 * product - jnp.sum(jnp.square(place_parts), axis=-1)
    return product * similarity.scale

  stacked = over_window(lambda place, _: scores(place), pad_window(key, window), window, size)
  weights = jax.nn.softmax(stacked, axis=0)
  return jnp.einsum("kbhwp,bp->bhwk", weights, shares.astype(wide))


def attend_locally(
  query: Float[Array, "b h w d"],
  key: Float[Array, "b y x d"],
  value: Float[Array, "b y x c"],
  shares: Float[Array, "b p"],
  window: int,
  similarity: Similarity = DOT_PRODUCT,
) -> Float[Array, "b h w c"]:
  """Returns the values of each position's window, averaged by `local_attention_map`."""
  weights = local_attention_map(query, key, shares, window, similarity)
  by_place = jnp.moveaxis(weights.astype(value.dtype), -1, 0)[..., None]
  return _sum_over_window(
    lambda place, index: place * by_place[index], pad_window(value, window), window, query.shape
  )


def attend_by_channel(
  query: Float[Array, "b h w c"],
  key: Float[Array, "b y x c"],
  value: Float[Array, "b y x mc"],
  window: int,
  *,
  key_bias: Float[Array, "k c"] | None = None,
  value_weights: Float[Array, "m k"] | None = None,
) -> Float[Array, "b h w c"]:
  """Averages each channel of a window by a softmax of its own, over q k of that channel.

  Args:
    query: of each position that looks.
    key: padded, so that the window of position (i, j) begins there: h + window - 1 rows or more.
    value: padded likewise; with `value_weights` [b y x m*c], one map after the other.
    window: side of the window.
    key_bias: added to the keys, by place in the window.
    value_weights: mixes several value maps, by place in the window.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  size = (query.shape[1], query.shape[2])
  query = query.astype(wide)
  bias = jnp.zeros((window**2, query.shape[-1]), wide) if key_bias is None else key_bias

  def score(place: Float[Array, "b h w c"], index: Int[Array, ""]) -> Float[Array, "b h w c"]:
    return query * (place.astype(wide) + bias[index].reshape(1, 1, 1, -1))

  def larger(highest: Array, index: Array) -> tuple[Array, None]:
    return jnp.maximum(highest, score(_slice(key, index, window, size), index)), None

  # A softmax does not depend on what is subtracted: its gradient may leave the maximum out.
  lowest = jnp.full_like(query, -jnp.inf)
  highest, _ = jax.lax.scan(larger, lowest, jnp.arange(window**2))
  highest = jax.lax.stop_gradient(highest)

  @jax.checkpoint
  def terms(index: Int[Array, ""]) -> tuple[Array, Array]:
    weight = jnp.exp(score(_slice(key, index, window, size), index) - highest)
    place = _slice(value, index, window, size).astype(wide)
    if value_weights is not None:
      maps = place.reshape(*place.shape[:-1], value_weights.shape[0], -1)
      place = jnp.einsum("bhwmc,m->bhwc", maps, value_weights[:, index])
    return weight, weight * place

  def add(sums: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
    weight, product = terms(index)
    return (sums[0] + weight, sums[1] + product), None

  zero = jnp.zeros_like(query)
  (total, averaged), _ = jax.lax.scan(add, (zero, zero), jnp.arange(window**2))
  return (averaged / total).astype(value.dtype)


def pad_window(x: Float[Array, "b y x c"], window: int) -> Float[Array, "b i j c"]:
  """Surrounds a map with the zeros that windows at its border look at.

  Raises:
    ValueError: the window has no middle.
  """
  if window < 1 or window % 2 == 0:
    raise ValueError(f"the side of a window must be odd, to have a middle, not {window}")
  radius = window // 2
  return jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))


def over_window(
  function: Callable[[Array, Array], Array],
  padded: Float[Array, "b i j c"],
  window: int,
  size: tuple[int, int],
) -> Float[Array, "k b h w _"]:
  """Returns a function of what lies at each place of every window, places first.

  Args:
    function: of [b h w c] and the place's number; recomputed in the backward pass.
    padded: as `pad_window` returns it.
    window: its side.
    size: of the map that looks.
  """

  def at(index: Int[Array, ""]) -> Array:
    return function(_place(padded, index, window, size), index)

  return jax.lax.map(jax.checkpoint(at), jnp.arange(window**2))


def _sum_over_window(
  function: Callable[[Array, Array], Array],
  padded: Float[Array, "b i j c"],
  window: int,
  shape: tuple[int, ...],
) -> Float[Array, "b h w c"]:
  @jax.checkpoint
  def at(index: Int[Array, ""]) -> Array:
    return function(_place(padded, index, window, shape[1:3]), index)

  def add(total: Array, index: Array) -> tuple[Array, None]:
    return total + at(index), None

  zero = jnp.zeros((*shape[:3], padded.shape[-1]), padded.dtype)
  return jax.lax.scan(add, zero, jnp.arange(window**2))[0]


def _place(
  padded: Float[Array, "b i j c"], index: Int[Array, ""], window: int, size: tuple[int, ...]
) -> Float[Array, "b h w c"]:
  """Returns what lies at one place of every window, for positions of a map of this size."""
  own = (padded.shape[1] - window + 1, padded.shape[2] - window + 1)
  return resize_nearest(_slice(padded, index, window, own), (size[0], size[1]))


def _slice(
  padded: Float[Array, "b i j c"], index: Int[Array, ""], window: int, size: tuple[int, int]
) -> Float[Array, "b h w c"]:
  """Returns the part of a padded map that begins at one place of the first window."""
  start = (0, index // window, index % window, 0)
  return jax.lax.dynamic_slice(padded, start, (len(padded), *size, padded.shape[-1]))
