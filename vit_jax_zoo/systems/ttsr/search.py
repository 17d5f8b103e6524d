"""TTSR's relevance search: hard and soft attention in blocks, without the full similarity matrix.

arXiv:2006.04139, section 3.1. The search runs over blocks of queries and of reference positions
with a running maximum; only the relevance of the matches is recomputed, with a gradient. The
product of two patches is a sum of pixel products common to neighbouring pairs: with columns of
three pixels, `P(q, r) = C(q-1, r-1) + C(q, r) + C(q+1, r+1)`, a third of the multiplications. Axes:
`h w` of the query map, `i j` of the reference, `c` channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Queries and reference positions per block: 8 MB of products for each image.
BLOCK_SIZE = (1024, 2048)

PATCH = 3
_EPSILON = 1e-12  # minimum norm of a patch, as in the official code
_OUTSIDE = -PATCH  # a row whose patch lies outside of the map

Queries: TypeAlias = Float[Array, "b h w c"]
References: TypeAlias = Float[Array, "b i j c"]
Index: TypeAlias = Int[Array, "b h w"]


class Match(NamedTuple):
  """The best match of each patch: hard (Eq. 5) and soft attention (Eq. 7)."""

  index: Index  # i * width + j of the reference patch's centre; first of equal ones
  relevance: Float[Array, "b h w"]  # cosine of the two patches, float32


def find_matches(
  queries: Queries, references: References, *, block_size: tuple[int, int] = BLOCK_SIZE
) -> Match:
  """Returns the most similar 3x3 patch of a reference map for each 3x3 patch of a map (Eq. 4).

  Maps are padded with zeros; every position is the centre of a patch. Products are float32 at the
  highest precision for maps of any dtype: with less, matches change. The relevance has
  gradients, the index has none. `block_size` affects only memory and speed.
  """
  if min(block_size) < 1:
    raise ValueError(f"block_size: {block_size}; expected positive numbers")
  queries, references = _wide(queries), _wide(references)
  index = _search(lax.stop_gradient(queries), lax.stop_gradient(references), block_size)
  return Match(index, relevance_of(queries, references, index))


def relevance_of(queries: Queries, references: References, index: Index) -> Float[Array, "b h w"]:
  """Returns the cosine of each query patch and the reference patch at `index` (float32)."""
  queries, references = _wide(queries), _wide(references)
  rows, columns = jnp.divmod(index, references.shape[2])
  around = _pad(queries)

  def add(products: Array, offset: Array) -> tuple[Array, None]:
    ref = _windows(references, rows + offset[0], columns + offset[1], 1)[..., 0, 0, :]
    ours = _shifted(around, offset, (queries.shape[1], queries.shape[2]))
    return products + jnp.sum(ours * ref, axis=-1), None

  # Without the checkpoint the backward pass would save all nine gathered maps.
  zeros = jnp.zeros(index.shape, queries.dtype)
  products, _ = lax.scan(jax.checkpoint(add), zeros, _offsets())
  scales = _windows(_inverse_lengths(references)[..., None], rows, columns, 1)[..., 0, 0, 0]
  return products * _inverse_lengths(queries) * scales


def transfer(
  reference: Float[Array, "b y x c"], index: Index, *, grid_width: int, scale: int = 1
) -> Float[Array, "b hs ws c"]:
  """Returns the mean of the overlapping reference patches of all matches (Eq. 6).

  A patch has 3x3 cells of `scale`x`scale` pixels; `grid_width` is the width of the searched map.
  Sums are divided by nine at the border as well, as in the official code.
  """
  if reference.shape[2] != grid_width * scale:
    wrong = f"reference: its width is {reference.shape[2]}"
    raise ValueError(f"{wrong}; expected {scale} times grid_width={grid_width}")
  batch, height, width = index.shape
  rows, columns = jnp.divmod(index, grid_width)
  rows, columns = _pad(rows, _OUTSIDE), _pad(columns, _OUTSIDE)
  wide = _wide(reference)  # so that the gradient, a sum over many patches, is float32

  def add(total: Array, offset: Array) -> tuple[Array, None]:
    # Cell (y, x) has `offset` in the patch that matches its neighbour at -offset.
    neighbours = (_shifted(x, -offset, (height, width)) for x in (rows, columns))
    row, column = (x + o for x, o in zip(neighbours, offset, strict=True))
    return total + _windows(wide, row, column, scale), None

  zeros = jnp.zeros((batch, height, width, scale, scale, reference.shape[-1]), wide.dtype)
  total, _ = lax.scan(add, zeros, _offsets())
  total = jnp.swapaxes((total / PATCH**2).astype(reference.dtype), 2, 3)
  return total.reshape(batch, height * scale, width * scale, -1)


def transfer_levels(values: Sequence[Array], index: Index) -> tuple[Array, ...]:
  """Returns the textures of maps of 1, 2 and 4 times the sides of the searched map."""
  width = values[0].shape[2]
  levels = zip(values, (1, 2, 4), strict=True)
  return tuple(transfer(value, index, grid_width=width, scale=scale) for value, scale in levels)


def _search(queries: Queries, references: References, block: tuple[int, int]) -> Index:
  """Returns the first index of the largest cosine.

  Positions are numbered along rows padded with a zero at either end: neighbours have constant
  distances, and a block of positions is one slice of any length.
  """
  batch, height, width, _ = queries.shape
  rows, columns = references.shape[1:3]
  query_block = min(block[0], height * (width + 2))
  ref_block = min(block[1], rows * (columns + 2))
  query_columns = _column_reader(queries, query_block)
  ref_columns = _column_reader(references, ref_block)
  # Positive exactly at positions of the map, zero at the padding of rows.
  scales = jnp.pad(_inverse_lengths(references), ((0, 0), (0, 0), (1, 1))).reshape(batch, -1)
  scales = jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % ref_block)))

  def best_of(query_start: Array) -> Array:
    query = query_columns(query_start)

    def compare(best: tuple[Array, Array], ref_start: Array) -> tuple[tuple[Array, Array], None]:
      ref = ref_columns(ref_start)
      products = jnp.einsum("bqc,brc->bqr", query, ref, precision=lax.Precision.HIGHEST)
      patches = products[:, :-2, :-2] + products[:, 1:-1, 1:-1] + products[:, 2:, 2:]
      scale = lax.dynamic_slice_in_dim(scales, ref_start, ref_block, axis=1)[:, None]
      cosines = jnp.where(scale > 0, patches * scale, -jnp.inf)  # times the query's norm
      value, position = jnp.max(cosines, axis=-1), jnp.argmax(cosines, axis=-1)
      better = value > best[0]  # not >=: the first of equal ones
      position = position.astype(jnp.int32) + ref_start
      return (jnp.where(better, value, best[0]), jnp.where(better, position, best[1])), None

    nothing = jnp.full((batch, query_block), -jnp.inf, queries.dtype)
    first = jnp.ones((batch, query_block), jnp.int32)  # the result where features are NaN
    starts = jnp.arange(0, scales.shape[1], ref_block, dtype=jnp.int32)
    return lax.scan(compare, (nothing, first), starts)[0][1]

  starts = jnp.arange(0, height * (width + 2), query_block, dtype=jnp.int32)
  positions = jnp.moveaxis(lax.map(best_of, starts), 0, 1).reshape(batch, -1)
  positions = positions[:, : height * (width + 2)].reshape(batch, height, -1)[:, :, 1:-1]
  return positions // (columns + 2) * columns + positions % (columns + 2) - 1


def _column_reader(maps: Queries, block: int) -> Callable[[Array], Array]:
  """Returns a function from a position to a block's columns of three pixels, `[b block+2 3c]`."""
  stride = maps.shape[2] + 2
  count = maps.shape[1] * stride
  flat = _pad(maps).reshape(maps.shape[0], -1, maps.shape[-1])
  flat = jnp.pad(flat, ((0, 0), (1, -count % block + 1), (0, 0)))

  def read(start: Array) -> Array:
    starts = (start + k * stride for k in range(PATCH))
    rows = [lax.dynamic_slice_in_dim(flat, first, block + 2, axis=1) for first in starts]
    return jnp.concatenate(rows, axis=-1)

  return read


def _inverse_lengths(maps: Queries) -> Float[Array, "b h w"]:
  squares = _pad(jnp.sum(maps**2, axis=-1))
  height, width = maps.shape[1:3]
  total = sum(squares[:, y : y + height, x : x + width] for y in range(PATCH) for x in range(PATCH))
  # The maximum inside excludes the root's infinite gradient at zero.
  return lax.rsqrt(jnp.maximum(jnp.asarray(total), _EPSILON**2))


def _windows(maps: References, rows: Index, columns: Index, size: int) -> Array:
  numbers = lax.GatherDimensionNumbers((2, 3, 4), collapsed_slice_dims=(), start_index_map=(0, 1))

  def gather(one: Array, corners: Array) -> Array:
    shape = (size, size, one.shape[-1])
    return lax.gather(one, corners, numbers, shape, mode="fill", fill_value=0)

  return jax.vmap(gather)(maps, jnp.stack([rows, columns], axis=-1) * size)


def _shifted(padded: Array, offset: Int[Array, " 2"], size: tuple[int, int]) -> Array:
  padded = lax.dynamic_slice_in_dim(padded, offset[0] + 1, size[0], axis=1)
  return lax.dynamic_slice_in_dim(padded, offset[1] + 1, size[1], axis=2)


def _pad(x: Array, value: Any = 0) -> Array:
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), *[(0, 0)] * (x.ndim - 3)), constant_values=value)


def _offsets() -> Int[Array, "9 2"]:
  return jnp.indices((PATCH, PATCH), jnp.int32).reshape(2, -1).T - 1


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
