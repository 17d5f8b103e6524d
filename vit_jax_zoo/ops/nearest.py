"""Nearest-neighbour resizing with the indices that PyTorch takes.

The source of output i is floor(i * in / out): the pixel at or before it. `jax.image.resize` takes
the pixel whose centre is nearest instead, which gives other masks and other feature maps.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def nearest_indices(size: int, new_size: int) -> Int[np.ndarray, " n"]:
  """Returns the source index of each of `new_size` outputs; in float32, as the reference rounds."""
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
    if new_size % old_size == 0:  # repetition has a sum as its gradient, in place of a scatter
      x = jnp.repeat(x, new_size // old_size, axis=axis, total_repeat_length=new_size)
    else:
      indices = nearest_indices(old_size, new_size)
      x = jnp.take(x, jnp.asarray(indices), axis=axis, indices_are_sorted=True, mode="clip")
  return x
