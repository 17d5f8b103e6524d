r"""TTSR's texture search: time and memory, compared with the official algorithm.

  python benchmarks/texture_search.py
  python benchmarks/texture_search.py --sizes=32x32:64x64,240x135:240x135 --textures --peer
  python benchmarks/texture_search.py --compile_only --sizes=270x480:270x480 --textures

Rows:

* ours: `find_matches` and `transfer`, in blocks;
* plain: the official algorithm in JAX, with all patches unfolded and the full similarity matrix;
* products: only the matrix products of ours and their row maxima, forward and without textures;
* PyTorch, with `--peer` (`pip install -e '.[parity]'`): the official algorithm in a process of its
  own.

Sizes are height x width of the feature maps of image and reference, a quarter of the sides of the
upscaled image and the reference. "temp" are temporaries by the compiler, "total" includes arguments
and results, "resident" is the growth of the process's peak memory in the warm-up run; larger rows
come later, so that they are not hidden by smaller ones.

There is no Pallas kernel: at 1024x2048 positions and 256 channels the products are 3.2 GFLOP with
about 17 MB of traffic for their results, or 190 FLOP per byte, where float32 products at the
highest precision are compute-bound above 20 to 40. By that count, which was not measured on a GPU
or TPU, a fused kernel could save 10 to 20 % at most.
"""

import argparse
import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import timing

from vit_jax_zoo.systems.ttsr.search import BLOCK_SIZE, find_matches, transfer

Search = Callable[..., tuple[jax.Array, ...]]
"""Queries, references and texture levels to index, relevance and transferred textures."""

CHANNELS = (64, 128, 256)  # VGG-19's relu1_1, relu2_1, relu3_1
HEADER = ("image:reference", "form", "temp GB", "total GB", "resident GB", "seconds", "same index")


def unfold(maps: jax.Array, scale: int = 1) -> jax.Array:
  """Returns all patches of 3x3 cells, `[b positions pixels*c]`."""
  size, step = 3 * scale, scale
  patches = jax.lax.conv_general_dilated_patches(
    maps,
    (size, size),
    (step, step),
    ((step, step),) * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return patches.reshape(patches.shape[0], -1, patches.shape[-1])


def plain_matches(queries: jax.Array, references: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Official search: the matrix of all normalized patches and its maximum over the references."""
  left, right = (
    x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
    for x in (unfold(queries), unfold(references))
  )
  matrix = jnp.einsum("bqk,brk->bqr", left, right, precision=jax.lax.Precision.HIGHEST)
  shape = queries.shape[:3]
  return jnp.argmax(matrix, -1).reshape(shape), jnp.max(matrix, -1).reshape(shape)


def plain_transfer(reference: jax.Array, index: jax.Array, scale: int) -> jax.Array:
  """Official transfer: gathers patches of the reference and folds them."""
  batch, height, width = index.shape
  patches = unfold(reference, scale)
  chosen = jax.vmap(lambda p, i: p[i])(patches, index.reshape(batch, -1))
  side = 3 * scale
  chosen = chosen.reshape(batch, height, width, -1, side, side)
  folded = jnp.zeros((batch, chosen.shape[3], (height + 2) * scale, (width + 2) * scale))
  for y in range(3):
    for x in range(3):
      cell = chosen[..., y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
      tile = cell.transpose(0, 3, 1, 4, 2, 5).reshape(batch, -1, height * scale, width * scale)
      rows = slice(y * scale, (y + height) * scale)
      folded = folded.at[:, :, rows, x * scale : (x + width) * scale].add(tile)
  return jnp.moveaxis(folded[:, :, scale:-scale, scale:-scale] / 9, 1, -1)


def ours(
  queries: jax.Array, references: jax.Array, *levels: jax.Array, block_size: tuple[int, int]
) -> tuple[jax.Array, ...]:
  """This package's search and transfer."""
  match = find_matches(queries, references, block_size=block_size)
  width = references.shape[2]
  textures = [transfer(x, match.index, grid_width=width, scale=x.shape[2] // width) for x in levels]
  return (match.index, match.relevance, *textures)


def plain(queries: jax.Array, references: jax.Array, *levels: jax.Array) -> tuple[jax.Array, ...]:
  """The official search and transfer."""
  index, relevance = plain_matches(queries, references)
  width = references.shape[2]
  return (index, relevance, *(plain_transfer(x, index, x.shape[2] // width) for x in levels))


def products(
  queries: jax.Array, references: jax.Array, *_: jax.Array, block_size: tuple[int, int]
) -> tuple[jax.Array, ...]:
  """Products of columns of three pixels in the blocks of `ours`, and each row's maximum."""

  def blocks(maps: jax.Array, size: int) -> jax.Array:
    flat = jnp.concatenate([maps.reshape(1, -1, maps.shape[-1])] * 3, axis=-1)
    size = min(size, flat.shape[1])
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % size), (0, 0)))
    return flat.reshape(-1, size, flat.shape[-1])

  reference_blocks = blocks(references, block_size[1])

  def best_of(query_block: jax.Array) -> jax.Array:
    def compare(best: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
      scores = jnp.einsum("qc,rc->qr", query_block, block, precision=jax.lax.Precision.HIGHEST)
      return jnp.maximum(best, jnp.max(scores, axis=-1)), None

    return jax.lax.scan(compare, jnp.full(len(query_block), -jnp.inf), reference_blocks)[0]

  return (jax.lax.map(best_of, blocks(queries, block_size[0])),)


def gradient(function: Search) -> Search:
  """Returns the gradient of the sum of all results except the index."""

  def total(*maps: jax.Array) -> jax.Array:
    return sum(jnp.sum(x) for x in function(*maps)[1:])

  return lambda *maps: jax.grad(total, argnums=tuple(range(len(maps))))(*maps)


def make_inputs(size: str, *, textures: bool) -> list[np.ndarray]:
  """Returns random feature maps, non-negative as after a ReLU: queries, references, textures."""
  (h, w), (i, j) = ([int(side) for side in part.split("x")] for part in size.split(":"))
  shapes = [(1, h, w, CHANNELS[2]), (1, i, j, CHANNELS[2])]
  if textures:
    shapes += [(1, i * s, j * s, c) for s, c in zip((1, 2, 4), CHANNELS[::-1], strict=True)]
  rng = np.random.default_rng(0)
  return [np.maximum(rng.standard_normal(shape, np.float32), 0) for shape in shapes]


def plain_gb(queries: np.ndarray, references: np.ndarray) -> float:
  """Returns the minimum memory of the official algorithm: the matrix and both lists of patches."""
  rows, columns = (np.prod(x.shape[1:3]) for x in (queries, references))
  return float(4e-9 * (rows * columns + (rows + columns) * 9 * CHANNELS[2]))


def measure(
  function: Search, inputs: list[np.ndarray], flags: argparse.Namespace
) -> tuple[list[str], np.ndarray | None]:
  """Returns the cells of a row, and the first result (the index) if it ran."""
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
  compiled = jax.jit(function).lower(*shapes).compile()
  memory = compiled.memory_analysis()
  temporary = memory.temp_size_in_bytes
  total = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
  cells = [f"{temporary / 1e9:.3f}", f"{total / 1e9:.3f}"]
  if flags.compile_only:
    return [*cells, "-", "-"], None
  maps = [jnp.asarray(x) for x in inputs]
  before = timing.resident_gb()
  results = jax.block_until_ready(compiled(*maps))
  grown = timing.resident_gb() - before
  times = timing.time_rounds(timing.repeated(lambda: compiled(*maps)), flags.rounds)
  return [*cells, f"{grown:.3f}", timing.spread(times)], np.asarray(results[0])


def rows(size: str, flags: argparse.Namespace) -> list[list[str]]:
  """Returns the rows of one pair of sizes."""
  inputs = make_inputs(size, textures=flags.textures)
  block_size = tuple(int(n) for n in flags.block_size.split(","))
  wrap = gradient if flags.backward else lambda function: function
  blockwise = wrap(functools.partial(ours, block_size=block_size))
  only_products, _ = measure(functools.partial(products, block_size=block_size), inputs, flags)
  cells, index = measure(blockwise, inputs, flags)
  table_rows = [[size, "products", *only_products, "-"], [size, "ours", *cells, "-"]]
  least = plain_gb(*inputs[:2])
  if least > flags.plain_limit_gb and not flags.compile_only:
    return [*table_rows, [size, "plain", "-", f"over {least:.1f}", "-", "skipped", "-"]]
  cells, expected = measure(wrap(plain), inputs, flags)
  compared = index is not None and not flags.backward
  table_rows.append(
    [size, "plain", *cells, f"{np.mean(index == expected):.2%}" if compared else "-"]
  )
  if flags.peer:
    from implementations import torch_ttsr

    grown, times = timing.in_new_process(torch_ttsr.measure, inputs, flags.rounds)
    table_rows.append([size, "PyTorch", "-", "-", f"{grown:.3f}", timing.spread(times), "-"])
  return table_rows


def main() -> None:
  """Measures all sizes and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--sizes", default="20x20:20x20,40x40:40x40,80x80:80x80", help="HxW:HxW,...")
  parser.add_argument("--textures", action="store_true", help="transfer three levels of textures")
  parser.add_argument("--backward", action="store_true", help="gradients instead of results")
  parser.add_argument("--compile_only", action="store_true", help="memory only, runs nothing")
  parser.add_argument("--peer", action="store_true", help="also the official algorithm in PyTorch")
  parser.add_argument("--block_size", default=",".join(map(str, BLOCK_SIZE)), help="queries,keys")
  parser.add_argument("--plain_limit_gb", type=float, default=4.0, help="skip larger plain forms")
  parser.add_argument("--rounds", type=int, default=3, help="timed runs after the warm-up")
  flags = parser.parse_args()
  if flags.peer and (flags.backward or flags.compile_only):
    sys.exit("--peer runs forward only; for gradients see peers.py --pairs=ttsr")
  print(timing.machine(), flush=True)
  table = [row for size in flags.sizes.split(",") for row in rows(size, flags)]
  print(f"\n{timing.markdown(HEADER, table)}")


if __name__ == "__main__":
  main()
