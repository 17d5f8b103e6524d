r"""Time and peak memory of TTSR's search for matching patches, beside the official algorithm.

  python benchmarks/relevance.py
  python benchmarks/relevance.py --sizes=32x32:64x64,240x135:240x135 --textures
  python benchmarks/relevance.py --compile_only --sizes=270x480:270x480 --textures

"ours" is `ops.relevance`; "plain" unfolds all patches and makes the whole matrix, with the same
operators; "products" is what of ours is matrix products and their maxima, forward and without
textures. Each runs once to warm up, by which memory is told, then `--rounds` times: seconds are the
median, and the range. Sizes are those of the feature maps, height x width of the picture that asks
and of the reference: a quarter of the sides of enlarged picture and reference. "memory" is what the
compiler sets aside beside arguments and results; "resident" is by how much the process grew beyond
all that it had been before, on a CPU: smaller sizes hide a part of it.

There is no Pallas kernel. For 1024 x 2048 positions with 256 channels the products are 3.2 GFLOP in
float32, and what XLA writes and reads of their results is some 17 MB: 190 FLOP a byte, where GPUs
and TPUs want 20 to 40 to be kept busy by products of float32 at the highest precision. By that
count a kernel that kept the results on the chip would save a tenth or two at best; there was no
such device here to show that it does.
"""

import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from timing import machine, spread

from vit_jax_zoo.systems.ttsr.search import BLOCK_SIZE, find_matches, transfer

_SIZES = flags.DEFINE_list(
  "sizes", ["20x20:20x20", "40x40:40x40", "80x80:80x80"], "Pairs of sizes."
)
_TEXTURES = flags.DEFINE_bool("textures", False, "Transfers the textures of three levels, too.")
_BACKWARD = flags.DEFINE_bool("backward", False, "Measures the gradient in place of the result.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Prints memory and runs nothing.")
_BLOCK = flags.DEFINE_list("block_size", [str(n) for n in BLOCK_SIZE], "Queries, references.")
_PLAIN_LIMIT = flags.DEFINE_float("plain_limit_gb", 4.0, "Leaves out larger plain forms.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed runs, after the one that warms up.")
_CHANNELS = (64, 128, 256)  # VGG-19's relu1_1, relu2_1, relu3_1


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
  """The official search: all normalised patches, one matrix, its maximum over the references."""
  asked, known = unfold(queries), unfold(references)
  asked, known = (
    x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
    for x in (asked, known)
  )
  matrix = jnp.einsum("bqk,brk->bqr", asked, known, precision=jax.lax.Precision.HIGHEST)
  shape = queries.shape[:3]
  return jnp.argmax(matrix, -1).reshape(shape), jnp.max(matrix, -1).reshape(shape)


def plain_transfer(reference: jax.Array, index: jax.Array, scale: int) -> jax.Array:
  """The official transfer: patches of the whole reference, gathered and folded."""
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


def ours(queries: jax.Array, references: jax.Array, *levels: jax.Array) -> tuple[jax.Array, ...]:
  """The package's search and transfer."""
  block_size = (int(_BLOCK.value[0]), int(_BLOCK.value[1]))
  match = find_matches(queries, references, block_size=block_size)
  width = references.shape[2]
  textures = [transfer(x, match.index, grid_width=width, scale=x.shape[2] // width) for x in levels]
  return (match.index, match.relevance, *textures)


def plain(queries: jax.Array, references: jax.Array, *levels: jax.Array) -> tuple[jax.Array, ...]:
  """The official search and transfer."""
  index, relevance = plain_matches(queries, references)
  width = references.shape[2]
  return (index, relevance, *(plain_transfer(x, index, x.shape[2] // width) for x in levels))


def products(queries: jax.Array, references: jax.Array, *_: jax.Array) -> tuple[jax.Array, ...]:
  """The products of columns of three pixels, in the blocks of ours, and each row's maximum."""

  def blocks(maps: jax.Array, size: int) -> jax.Array:
    flat = jnp.concatenate([maps.reshape(1, -1, maps.shape[-1])] * 3, axis=-1)
    size = min(size, flat.shape[1])
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % size), (0, 0)))
    return flat.reshape(-1, size, flat.shape[-1])

  known = blocks(references, int(_BLOCK.value[1]))

  def best_of(asked: jax.Array) -> jax.Array:
    def compare(best: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
      found = jnp.einsum("qc,rc->qr", asked, block, precision=jax.lax.Precision.HIGHEST)
      return jnp.maximum(best, jnp.max(found, axis=-1)), None

    return jax.lax.scan(compare, jnp.full(len(asked), -jnp.inf), known)[0]

  return (jax.lax.map(best_of, blocks(queries, int(_BLOCK.value[0]))),)


def gradient(
  function: Callable[..., tuple[jax.Array, ...]],
) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns the gradient of the sum of all results but the index."""

  def total(*maps: jax.Array) -> jax.Array:
    return sum(jnp.sum(x) for x in function(*maps)[1:])

  return lambda *maps: jax.grad(total, argnums=tuple(range(len(maps))))(*maps)


def inputs(size: str, rng: np.random.Generator | None) -> list[jax.Array | jax.ShapeDtypeStruct]:
  """Returns random maps of a pair of sizes; without `rng`, their shapes alone."""
  (h, w), (i, j) = ([int(side) for side in part.split("x")] for part in size.split(":"))
  shapes = [(1, h, w, _CHANNELS[2]), (1, i, j, _CHANNELS[2])]
  if _TEXTURES.value:
    shapes += [(1, i * s, j * s, c) for s, c in zip((1, 2, 4), _CHANNELS[::-1], strict=True)]
  if rng is None:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  # As after a ReLU.
  return [jnp.asarray(np.maximum(rng.normal(size=s), 0), jnp.float32) for s in shapes]


def plain_gigabytes(size: str) -> float:
  """Returns the least that the plain form takes: the matrix and both lists of patches."""
  asked, known = (np.prod([int(side) for side in part.split("x")]) for part in size.split(":"))
  return float(4e-9 * (asked * known + (asked + known) * 9 * _CHANNELS[2]))


def resident_gigabytes() -> float:
  """Returns the largest resident size that the process has had (Linux counts in kilobytes)."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9


def measure(
  name: str, function: Callable[..., tuple[jax.Array, ...]], size: str
) -> list[np.ndarray]:
  """Prints one row; returns the results, if there are any."""
  if _BACKWARD.value and function is not products:
    function = gradient(function)
  compiled = jax.jit(function).lower(*inputs(size, None)).compile()
  memory = compiled.memory_analysis()
  temporary = memory.temp_size_in_bytes / 1e9
  total = temporary + (memory.argument_size_in_bytes + memory.output_size_in_bytes) / 1e9
  row = f"{size:24}{name:10}{temporary:10.3f}{total:10.3f}"
  if _COMPILE_ONLY.value:
    print(row, flush=True)
    return []
  maps = inputs(size, np.random.default_rng(0))
  before = resident_gigabytes()
  results = jax.block_until_ready(compiled(*maps))
  grown, seconds = resident_gigabytes() - before, []
  for _ in range(_ROUNDS.value):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*maps))
    seconds.append(time.perf_counter() - start)
  print(f"{row}{grown:12.3f}{spread(seconds):>24}", flush=True)
  return [np.asarray(x) for x in results]


def main(_: list[str]) -> None:
  """Prints the machine and the table: ours before plain, since the process never shrinks."""
  print(machine())
  print(f"{'picture:reference':24}{'form':10}{'temp GB':>10}{'all GB':>10}", end="")
  print("" if _COMPILE_ONLY.value else f"{'resident +':>12}{'seconds':>24}")
  for size in _SIZES.value:
    measure("products", products, size)
    found = measure("ours", ours, size)
    needed = plain_gigabytes(size)
    if needed > _PLAIN_LIMIT.value and not _COMPILE_ONLY.value:
      print(f"{size:24}{'plain':10}   at least {needed:.1f} GB, left out")
      continue
    expected = measure("plain", plain, size)
    if found and not _BACKWARD.value:
      same = np.mean(found[0] == expected[0])
      print(f"{'':24}the same patches at {same:.2%} of the positions")


if __name__ == "__main__":
  app.run(main)
