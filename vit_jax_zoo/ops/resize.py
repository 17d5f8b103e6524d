"""Resizing: nearest neighbour on the device, position embeddings on the host.

The published code bases resize position embeddings by different methods, whose results differ by 15
to 50 % of a table's root mean square: resize a checkpoint as its publisher did. All are separable.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from vit_jax_zoo.errors import check_names


def nearest_indices(size: int, new_size: int) -> Int[np.ndarray, " n"]:
  """Returns the source index of each of `new_size` outputs, in float32 as PyTorch rounds."""
  step = np.float32(size) / np.float32(new_size)
  indices = np.floor(np.arange(new_size, dtype=np.float32) * step).astype(np.int32)
  return np.minimum(indices, size - 1)


def resize_nearest(
  x: Shaped[Array, "*b h w c"], size: tuple[int, int]
) -> Shaped[Array, "*b i j c"]:
  """Resizes rows and columns to `size` (height, width)."""
  for axis, new_size in zip((-3, -2), size, strict=True):
    old_size = x.shape[axis]
    if new_size == old_size:
      continue
    if new_size % old_size == 0:  # the gradient of repetition is a sum instead of a scatter
      x = jnp.repeat(x, new_size // old_size, axis=axis, total_repeat_length=new_size)
    else:
      indices = nearest_indices(old_size, new_size)
      x = jnp.take(x, jnp.asarray(indices), axis=axis, indices_are_sorted=True, mode="clip")
  return x


def _corner_aligned(old: int, new: int) -> np.ndarray:
  """Linear, corners on corners, as vision_transformer and big_vision (scipy.ndimage.zoom).

  Where the last coordinate rounds just past the edge (28 -> 14, 24 -> 42, ...), zoom fills the
  last row and column with zeros. Here coordinates are clamped.
  """
  source = np.arange(new) * ((old - 1) / max(new - 1, 1))
  return _weights(np.clip(source, 0, old - 1), old, lambda x: np.maximum(1 - np.abs(x), 0), 1)


def _linear(old: int, new: int) -> np.ndarray:
  """Linear, half-pixel centres, no antialiasing: timm for Google's .npz files."""
  source = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
  return _weights(source, old, lambda x: np.maximum(1 - np.abs(x), 0), 1)


def _bicubic(old: int, new: int) -> np.ndarray:
  """Bicubic (a = -0.75), half-pixel centres, no antialiasing: Hugging Face transformers."""
  source = (np.arange(new) + 0.5) * (old / new) - 0.5
  return _weights(source, old, lambda x: _cubic(x, -0.75), 2)


def _bicubic_antialias(old: int, new: int) -> np.ndarray:
  """Bicubic (a = -0.5), half-pixel centres, widened when it shrinks: timm's default."""
  scale = max(old / new, 1.0)
  centre = (np.arange(new)[:, None] + 0.5) * (old / new)
  weights = _cubic((np.arange(old) + 0.5 - centre) / scale, -0.5)
  return weights / np.sum(weights, axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel, 0 from distance 2 on."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _weights(
  source: np.ndarray, old: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> np.ndarray:
  """Returns the kernel's weights at each source coordinate, with replicated edges."""
  weights = np.zeros((len(source), old))
  first = np.floor(source).astype(int)
  for tap in range(1 - reach, reach + 1):
    index = first + tap
    np.add.at(weights, (np.arange(len(source)), np.clip(index, 0, old - 1)), kernel(source - index))
  return weights


METHODS = {
  "corner_aligned": _corner_aligned,
  "linear": _linear,
  "bicubic": _bicubic,
  "bicubic_antialias": _bicubic_antialias,
}
"""Method name -> function of (old size, new size), which returns a matrix [new old]."""


def find_grid(
  rows: int, leading: Iterable[int], *grids: tuple[int, int] | None
) -> tuple[int, tuple[int, int]] | None:
  """Returns the number of rows before a position table's grid, and the grid; None if none fits.

  `leading` are numbers of rows of other tokens to try, in this order; `grids` heights and widths,
  None for a square.
  """
  for grid, first in itertools.product(grids, leading):
    height, width = grid or (math.isqrt(rows - first),) * 2
    if first + height * width == rows:
      return first, (height, width)
  return None


def resize_position_grid(
  table: Float[np.ndarray, "n d"],
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  method: str = "corner_aligned",
) -> Float[np.ndarray, "m d"]:
  """Resizes a table with a row for each token of a grid (height, width), without other tokens.

  ValueError for an unknown method, or if the table does not have `old_grid`'s rows.
  """
  check_names("position resizing method", [method], METHODS)
  height, width = old_grid
  if len(table) != height * width:
    raise ValueError(f"position table: {len(table)} rows; expected {height} x {width}")
  if tuple(old_grid) == tuple(new_grid):
    return table
  vertical, horizontal = (METHODS[method](*sizes) for sizes in zip(old_grid, new_grid, strict=True))
  grid = table.reshape(height, width, -1).astype(np.float64)
  resized = np.einsum("yh,hwd,xw->yxd", vertical, grid, horizontal, optimize=True)
  return resized.reshape(-1, table.shape[-1]).astype(table.dtype)
