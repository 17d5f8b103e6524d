"""Looking patches up in a reference picture: TTSR's hard and soft attention without the matrix.

Yang et al., "Learning Texture Transformer Network for Image Super-Resolution", CVPR 2020,
arXiv:2006.04139, section 3.1. Each 3x3 patch of one feature map is compared with each 3x3 patch of
another; the best match and its cosine are kept, and patches of the reference are laid where their
matches were found. The matrix of all pairs, and the lists of all patches, never exist:

* patches overlap, so the product of two patches is a sum of products of pixels, which neighbouring
  pairs share: with columns of three pixels, `P(q, r) = C(q-1, r-1) + C(q, r) + C(q+1, r+1)`. That
  takes a third of the multiplications, too;
* the search runs over blocks of queries and of reference positions with a running maximum;
* relevance is computed again, with a gradient, at the matches alone.

Memory is linear in each picture. Letters: `h w` rows and columns of the map that asks, `i j` those
of the reference, `c` channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK_SIZE = (1024, 2048)
"""Queries and reference positions compared at a time: 8 MB of products for each image."""

PATCH = 3
_EPSILON = 1e-12  # smallest length that a patch is divided by, as in the reference code
_OUTSIDE = -PATCH  # a row from which no offset of a patch leads into the map


class Match(NamedTuple):
  """Where each patch was found.

  Attributes:
    index: `i * width + j` of the centre of the most similar reference patch; the first of equals.
    relevance: cosine of the two patches, float32.
  """

  index: Int[Array, "b h w"]
  relevance: Float[Array, "b h w"]


def find_matches(
  queries: Float[Array, "b h w c"],
  references: Float[Array, "b i j c"],
  *,
  block_size: tuple[int, int] = BLOCK_SIZE,
) -> Match:
  """Finds, for each 3x3 patch of a map, the most similar one of a reference map.

  Maps are continued by zeros; every position is the centre of a patch. Products are float32 at the
  highest precision on any device, whatever the dtype of the maps: with less, matches flip.
  Gradients pass through the relevance of the matches into both maps, as through a maximum; the
  index has none.

  Args:
    queries: the map that asks.
    references: the map that is searched, of any size.
    block_size: queries and reference positions compared at a time. It changes memory and speed,
      not the result.

  Raises:
    ValueError: a block size is not positive.
  """
  if min(block_size) < 1:
    raise ValueError(f"block_size must be positive, but is {block_size}")
  queries, references = _wide(queries), _wide(references)
  index = _search(lax.stop_gradient(queries), lax.stop_gradient(references), block_size)
  return Match(index, relevance_of(queries, references, index))


def relevance_of(
  queries: Float[Array, "b h w c"],
  references: Float[Array, "b i j c"],
  index: Int[Array, "b h w"],
) -> Float[Array, "b h w"]:
  """Returns the cosine of each query patch and the reference patch that `index` names (float32)."""
  queries, references = _wide(queries), _wide(references)
  rows, columns = jnp.divmod(index, references.shape[2])
  around = _pad(queries)

  def add(products: Array, offset: Array) -> tuple[Array, None]:
    theirs = _windows(references, rows + offset[0], columns + offset[1], 1)[..., 0, 0, :]
    ours = _shifted(around, offset, (queries.shape[1], queries.shape[2]))
    return products + jnp.sum(ours * theirs, axis=-1), None

  # Without the checkpoint a backward pass would keep all nine gathered maps.
  zeros = jnp.zeros(index.shape, queries.dtype)
  products, _ = lax.scan(jax.checkpoint(add), zeros, _offsets())
  scales = _windows(_inverse_lengths(references)[..., None], rows, columns, 1)[..., 0, 0, 0]
  return products * _inverse_lengths(queries) * scales


def transfer(
  reference: Float[Array, "b y x c"],
  index: Int[Array, "b h w"],
  *,
  grid_width: int,
  scale: int = 1,
) -> Float[Array, "b hs ws c"]:
  """Lays the reference patches of all matches over one another, and divides by nine.

  A patch has 3x3 cells of `scale`x`scale` pixels. At the border fewer than nine patches meet; like
  the reference code, this divides by nine there, too.

  Args:
    reference: a map of `scale` times the sides of the one that was searched.
    index: see `Match`.
    grid_width: width of the map that was searched.
    scale: pixels along the side of a cell.

  Raises:
    ValueError: the reference is not `scale` times as wide as the map that was searched.
  """
  if reference.shape[2] != grid_width * scale:
    raise ValueError(
      f"the reference is {reference.shape[2]} wide, but {scale} pixels for each of "
      f"{grid_width} cells make {grid_width * scale}"
    )
  batch, height, width = index.shape
  rows, columns = jnp.divmod(index, grid_width)
  rows, columns = _pad(rows, _OUTSIDE), _pad(columns, _OUTSIDE)
  wide = _wide(reference)  # so that the gradient, a sum over many patches, is float32

  def add(total: Array, offset: Array) -> tuple[Array, None]:
    # Cell (y, x) lies at `offset` in the patch that was found for its neighbour at -offset.
    neighbours = (_shifted(x, -offset, (height, width)) for x in (rows, columns))
    row, column = (x + o for x, o in zip(neighbours, offset, strict=True))
    return total + _windows(wide, row, column, scale), None

  zeros = jnp.zeros((batch, height, width, scale, scale, reference.shape[-1]), wide.dtype)
  total, _ = lax.scan(add, zeros, _offsets())
  total = jnp.swapaxes((total / PATCH**2).astype(reference.dtype), 2, 3)
  return total.reshape(batch, height * scale, width * scale, -1)


def _search(
  queries: Float[Array, "b h w c"],
  references: Float[Array, "b i j c"],
  block_size: tuple[int, int],
) -> Int[Array, "b h w"]:
  """Returns the first index of the largest cosine.

  Positions are numbered along rows that have a zero at either end. So neighbours stand at fixed
  distances, and a block of positions is one slice of memory, of any length.
  """
  batch, height, width, _ = queries.shape
  rows, columns = references.shape[1:3]
  query_block = min(block_size[0], height * (width + 2))
  ref_block = min(block_size[1], rows * (columns + 2))
  query_columns = _column_reader(queries, query_block)
  ref_columns = _column_reader(references, ref_block)
  # Positive exactly at real positions: rows' ends are no patches.
  scales = jnp.pad(_inverse_lengths(references), ((0, 0), (0, 0), (1, 1))).reshape(batch, -1)
  scales = jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % ref_block)))

  def best_of(query_start: Array) -> Array:
    asked = query_columns(query_start)

    def compare(best: tuple[Array, Array], ref_start: Array) -> tuple[tuple[Array, Array], None]:
      products = jnp.einsum(
        "bqc,brc->bqr", asked, ref_columns(ref_start), precision=lax.Precision.HIGHEST
      )
      patches = products[:, :-2, :-2] + products[:, 1:-1, 1:-1] + products[:, 2:, 2:]
      scale = lax.dynamic_slice_in_dim(scales, ref_start, ref_block, axis=1)[:, None]
      cosines = jnp.where(scale > 0, patches * scale, -jnp.inf)  # but for the query's own length
      value, place = jnp.max(cosines, axis=-1), jnp.argmax(cosines, axis=-1)
      better = value > best[0]  # not >=: the first of equals stays
      place = place.astype(jnp.int32) + ref_start
      return (jnp.where(better, value, best[0]), jnp.where(better, place, best[1])), None

    nothing = jnp.full((batch, query_block), -jnp.inf, queries.dtype)
    first = jnp.ones((batch, query_block), jnp.int32)  # stays where features are NaN
    starts = jnp.arange(0, scales.shape[1], ref_block, dtype=jnp.int32)
    return lax.scan(compare, (nothing, first), starts)[0][1]

  starts = jnp.arange(0, height * (width + 2), query_block, dtype=jnp.int32)
  places = jnp.moveaxis(lax.map(best_of, starts), 0, 1).reshape(batch, -1)
  places = places[:, : height * (width + 2)].reshape(batch, height, -1)[:, :, 1:-1]
  row, column = jnp.divmod(places, columns + 2)
  return row * columns + column - 1


def _column_reader(maps: Float[Array, "b h w c"], block: int) -> Callable[[Array], Array]:
  """Returns a function from a position to columns of three pixels, `[b block+2 3c]`.

  They belong to the position before it, to it and its successors, and to the one after the block.
  """
  stride = maps.shape[2] + 2
  count = maps.shape[1] * stride
  flat = _pad(maps).reshape(maps.shape[0], -1, maps.shape[-1])
  flat = jnp.pad(flat, ((0, 0), (1, -count % block + 1), (0, 0)))

  def read(start: Array) -> Array:
    rows = [
      lax.dynamic_slice_in_dim(flat, start + k * stride, block + 2, axis=1) for k in range(PATCH)
    ]
    return jnp.concatenate(rows, axis=-1)

  return read


def _inverse_lengths(maps: Float[Array, "b h w c"]) -> Float[Array, "b h w"]:
  """Returns one over the length of each patch."""
  squares = _pad(jnp.sum(maps**2, axis=-1))
  height, width = maps.shape[1:3]
  total = sum(squares[:, y : y + height, x : x + width] for y in range(PATCH) for x in range(PATCH))
  # The maximum stands inside, where it keeps the root's infinite slope at zero out of gradients.
  return lax.rsqrt(jnp.maximum(jnp.asarray(total), _EPSILON**2))


def _windows(
  maps: Float[Array, "b y x c"], rows: Int[Array, "b h w"], columns: Int[Array, "b h w"], size: int
) -> Float[Array, "b h w s s c"]:
  """Gathers cells of `size`x`size` pixels by their row and column; those outside are zeros."""
  numbers = lax.GatherDimensionNumbers(
    offset_dims=(2, 3, 4), collapsed_slice_dims=(), start_index_map=(0, 1)
  )

  def gather(one: Array, corners: Array) -> Array:
    shape = (size, size, one.shape[-1])
    return lax.gather(one, corners, numbers, shape, mode="fill", fill_value=0)

  return jax.vmap(gather)(maps, jnp.stack([rows, columns], axis=-1) * size)


def _shifted(padded: Array, offset: Int[Array, " 2"], size: tuple[int, int]) -> Array:
  """Returns the map whose (y, x) is that of the unpadded one at (y, x) + offset."""
  y, x = offset[0] + 1, offset[1] + 1
  padded = lax.dynamic_slice_in_dim(padded, y, size[0], axis=1)
  return lax.dynamic_slice_in_dim(padded, x, size[1], axis=2)


def _pad(x: Array, value: Any = 0) -> Array:
  """Puts a frame of one pixel around `[b h w ...]`."""
  widths = ((0, 0), (1, 1), (1, 1)) + ((0, 0),) * (x.ndim - 3)
  return jnp.pad(x, widths, constant_values=value)


def _offsets() -> Int[Array, "9 2"]:
  return jnp.stack(jnp.meshgrid(*[jnp.arange(-1, 2)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Brings `x` to float32, or leaves it float64."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
