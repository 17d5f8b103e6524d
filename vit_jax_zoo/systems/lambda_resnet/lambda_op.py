"""The lambda layer as functions of queries, keys and values, without parameters or modules.

Bello, "LambdaNetworks: Modeling long-range interactions without attention", ICLR 2021,
arXiv:2102.08602. A lambda is a small linear map `[k v]` that summarises a context; a query is
answered by applying a lambda to it. The content lambda (one per image) knows what the context
holds, the position lambda (one per query position) knows where. No tensor has a batch, a query and
a context axis together, so there is no attention map.

Letters: `b` images, `h w` rows and columns of the map, `n = h w` positions of queries, `m`
positions of the context, `i` heads, `k` depth of queries and keys, `v` depth of values (of one
head), `u` intra-depth. Heads share one lambda (the paper's multi-query lambdas): keys and values
have no head axis.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Implementation: TypeAlias = Literal["auto", "einsum", "convolution"]

# A dense matrix product does this many multiply-adds in the time in which a convolution with `u`
# input channels does one: on 16x16 and 32x32 maps with a 9x9 scope, forward and backward, the two
# ways break even where the context is about six times the scope.
EINSUM_ADVANTAGE = 6.0

# The paper computes position lambdas by einsum up to 85^2 positions (k = 16, u = 1): the
# size of the table of embeddings, which grows with the square of the positions, sets the limit.
EINSUM_MAX_ELEMENTS = 85**4 * 16

_MASKED_KEY = -1e30  # finite, so that a query without any context gives zeros in place of NaN
_MASKED_QUERIES_AT_ONCE = 8


class LambdaOutput(NamedTuple):
  """What a lambda layer computes.

  Attributes:
    output: answers to the queries, heads side by side, in the dtype of the queries.
    content_lambda: float32; with a mask every query has its own.
    position_lambda: float32; of the convolution or of the embeddings, the bias included.
  """

  output: Float[Array, "b h w i v"]
  content_lambda: Float[Array, "b k v"] | Float[Array, "b h w k v"]
  position_lambda: Float[Array, "b h w k v"] | None


def lambda_layer(
  queries: Float[Array, "b h w i k"],
  keys: Float[Array, "b h w u k"],
  values: Float[Array, "b h w u v"],
  embeddings: Float[Array, "dy dx u k"] | None,
  *,
  bias: Float[Array, " k"] | None = None,
  mask: Bool[Array, "n m"] | None = None,
  implementation: Implementation = "auto",
) -> LambdaOutput:
  """Applies content and position lambdas to the queries of a map (arXiv:2102.08602, eq. 1-2).

  Scope: `embeddings` of `[2h-1 2w-1]` reach from every position to every other (a global context);
  of `[r r]` they reach `r // 2` rows and columns away (the lambda convolution). The content lambda
  sees the whole map in either case. A sequence is a map of one row.

  Args:
    queries: not scaled here; the paper leaves `1/sqrt(k)` to the initialisation.
    keys: before the softmax, which this function takes over the positions of the context.
    values: of the context, which is the same map as that of the queries.
    embeddings: relative position embeddings, odd sides; the middle one belongs to the
      query's own position, the next along an axis to the context position one further on. Where
      they end, the embedding is zero.
      None leaves content lambdas alone.
    bias: added to every position lambda (both public codes have it, the paper does not).
    mask: True where query n may see context m, the same for every image. Keys are then normalised
      inside each query's context.
    implementation: "auto" takes the cheaper one of two that give the same numbers.

  Raises:
    ValueError: for embeddings with an even side, and for a convolution under a mask.
  """
  content = content_lambda(keys, values, mask=mask)
  if mask is None:
    output = jnp.einsum("bhwik,bkv->bhwiv", queries, content.astype(queries.dtype))
  else:
    content = content.reshape(*queries.shape[:3], *content.shape[2:])
    output = _apply(queries, content)
  if embeddings is None:
    return LambdaOutput(output.astype(queries.dtype), content, None)
  position = position_lambda(values, embeddings, mask=mask, implementation=implementation)
  if bias is not None:
    position += bias.astype(position.dtype).reshape(1, 1, 1, -1, 1)
  output = output.astype(position.dtype) + _apply(queries, position)
  return LambdaOutput(output.astype(queries.dtype), content, position)


def content_lambda(
  keys: Float[Array, "b h w u k"],
  values: Float[Array, "b h w u v"],
  *,
  mask: Bool[Array, "n m"] | None = None,
) -> Float[Array, "b k v"] | Float[Array, "b n k v"]:
  """Returns what the context holds: values summed with keys that add up to one over positions.

  With a mask there is one lambda per query; keys are normalised anew in every query's context, a
  few queries at a time, so that memory does not grow with queries times positions.
  """
  keys = keys.reshape(keys.shape[0], -1, *keys.shape[3:])
  keys = keys.astype(_accumulator(keys))
  values = values.reshape(values.shape[0], -1, *values.shape[3:])

  def summarise(visible: Bool[Array, " m"] | None) -> Float[Array, "b k v"]:
    if visible is None:
      weights = jax.nn.softmax(keys, axis=1)
    else:
      seen = visible[None, :, None, None]
      weights = jax.nn.softmax(jnp.where(seen, keys, _MASKED_KEY), axis=1) * seen
    return _accumulate("bmuk,bmuv->bkv", weights.astype(values.dtype), values)

  if mask is None:
    return summarise(None)
  per_query = jax.lax.map(jax.checkpoint(summarise), mask, batch_size=_MASKED_QUERIES_AT_ONCE)
  return jnp.swapaxes(per_query, 0, 1)


def position_lambda(
  values: Float[Array, "b h w u v"],
  embeddings: Float[Array, "dy dx u k"],
  *,
  mask: Bool[Array, "n m"] | None = None,
  implementation: Implementation = "auto",
) -> Float[Array, "b h w k v"]:
  """Returns, for every position, where in the context the values lie (float32).

  Raises:
    ValueError: for embeddings with an even side, and for a convolution under a mask.
  """
  for side in embeddings.shape[:2]:
    if side % 2 == 0:
      raise ValueError(
        f"relative position embeddings have sides {embeddings.shape[:2]}; both must be odd, "
        "so that one of them belongs to the query's own position"
      )
  if mask is not None and implementation == "convolution":
    raise ValueError(
      "a mask was given with implementation='convolution'; a convolution sees the same context "
      "everywhere, so use 'einsum' or 'auto'"
    )
  height, width = values.shape[1:3]
  embeddings = _resize(_resize(embeddings, 0, limit=2 * height - 1), 1, limit=2 * width - 1)
  embeddings = embeddings.astype(values.dtype)
  if implementation == "auto":
    implementation = "einsum"
    if mask is None:
      implementation = choose_implementation((height, width), embeddings.shape)
  if implementation == "convolution":
    return _position_by_convolution(values, embeddings)
  return _position_by_einsum(values, embeddings, mask)


def choose_implementation(
  map_size: tuple[int, int], embeddings_shape: tuple[int, ...]
) -> Literal["einsum", "convolution"]:
  """Returns the cheaper way to position lambdas, from shapes alone.

  Per query, key channel and value channel the einsum multiplies once for each position of the map,
  the convolution once for each position of the scope; but a matrix product runs faster. The einsum
  also needs all pairs' embeddings in memory, whatever the batch.

  Args:
    map_size: height and width.
    embeddings_shape: `[dy dx u k]`.
  """
  positions = map_size[0] * map_size[1]
  scope = min(embeddings_shape[0], 2 * map_size[0] - 1) * min(
    embeddings_shape[1], 2 * map_size[1] - 1
  )
  elements = positions**2 * embeddings_shape[2] * embeddings_shape[3]
  if elements > EINSUM_MAX_ELEMENTS or positions > EINSUM_ADVANTAGE * scope:
    return "convolution"
  return "einsum"


def relative_embeddings(
  embeddings: Float[Array, "dy dx u k"], map_size: tuple[int, int]
) -> Float[Array, "h hm w wm u k"]:
  """Lays relative embeddings out for all pairs of query row, context row, query and context column.

  Offsets that `embeddings` do not have get zeros; those that the map does not have are dropped.
  """
  height, width = map_size
  window = _resize(embeddings, 0, limit=2 * height - 1, pad=True)
  window = _resize(window, 1, limit=2 * width - 1, pad=True)
  return jax.vmap(jax.vmap(_all_pairs))(_all_pairs(window))


def _position_by_einsum(
  values: Float[Array, "b h w u v"],
  embeddings: Float[Array, "dy dx u k"],
  mask: Bool[Array, "n m"] | None,
) -> Float[Array, "b h w k v"]:
  height, width = values.shape[1:3]
  pairs = relative_embeddings(embeddings, (height, width))
  if mask is not None:
    visible = jnp.swapaxes(mask.reshape(height, width, height, width), 1, 2)
    pairs = jnp.where(visible[..., None, None], pairs, 0)
  return _accumulate("hywxuk,byxuv->bhwkv", pairs, values)


def _position_by_convolution(
  values: Float[Array, "b h w u v"], embeddings: Float[Array, "dy dx u k"]
) -> Float[Array, "b h w k v"]:
  """Convolves every value channel by itself: they stand in the batch axis."""
  batch, height, width, intra_depth, value_depth = values.shape
  maps = jnp.moveaxis(values, -1, 1).reshape(-1, height, width, intra_depth)
  lambdas = jax.lax.conv_general_dilated(
    maps.astype(_accumulator(maps)),
    embeddings.astype(_accumulator(maps)),
    window_strides=(1, 1),
    padding=[(side // 2, side // 2) for side in embeddings.shape[:2]],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jnp.moveaxis(lambdas.reshape(batch, value_depth, height, width, -1), 1, -1)


def _apply(
  queries: Float[Array, "b h w i k"], lambdas: Float[Array, "b h w k v"]
) -> Float[Array, "b h w i v"]:
  return jnp.einsum("bhwik,bhwkv->bhwiv", queries.astype(lambdas.dtype), lambdas)


def _accumulate(
  spec: str, left: Float[Array, "..."], right: Float[Array, "..."]
) -> Float[Array, "..."]:
  """Multiplies in the operands' dtype, adds in float32: lambdas square the scale of activations."""
  return jnp.einsum(spec, left, right, preferred_element_type=_accumulator(left))


def _accumulator(x: Float[Array, "..."]) -> jnp.dtype:
  """Returns float32, or float64 where that is what comes in."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _resize(
  x: Float[Array, "..."], axis: int, *, limit: int, pad: bool = False
) -> Float[Array, "..."]:
  """Crops an odd axis around its centre to `limit`; `pad` fills it up to that with zeros."""
  excess = (x.shape[axis] - limit) // 2
  if excess > 0:
    return jax.lax.slice_in_dim(x, excess, excess + limit, axis=axis)
  if not pad:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (-excess, -excess)
  return jnp.pad(x, widths)


def _all_pairs(offsets: Float[Array, "d ..."]) -> Float[Array, "n n ..."]:
  """Turns `[2n-1, ...]` by offset into `[n, n, ...]` by query and context: a Toeplitz layout.

  Rows of a matrix that is one column too wide slide by one against each other when it is read with
  a row length one shorter; that needs no gather, whose gradient would be a scatter.
  """
  size = (offsets.shape[0] + 1) // 2
  padded = jnp.concatenate([offsets, jnp.zeros_like(offsets[:1])])
  repeated = jnp.tile(padded, (size,) + (1,) * (offsets.ndim - 1))
  sliding = repeated[size - 1 : size - 1 + size * (2 * size - 1)]
  return sliding.reshape(size, 2 * size - 1, *offsets.shape[1:])[:, :size]
