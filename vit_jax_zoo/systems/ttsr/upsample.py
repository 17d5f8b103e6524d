"""Enlarging feature maps by whole factors, as PyTorch does it inside networks."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vit_jax_zoo.ops.resize import METHODS


def upsample_bicubic(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hf wf c"]:
  """Enlarges a map, bicubically: a = -0.75, half-pixel centres, edges repeated.

  It is PyTorch's `interpolate(mode="bicubic", align_corners=False)`; Pillow's and JAX's own bicubic
  resizes have a = -0.5. Results may lie outside the range of `x`.
  """
  return _upsample(_upsample(x, factor, 1), factor, 2)


def _upsample(x: Float[Array, "b h w c"], factor: int, axis: int) -> Float[Array, "b hf wf c"]:
  # All pixels are alike: each has `factor` successors, which see it and two on either side.
  weights = METHODS["bicubic"](5, 5 * factor)[2 * factor : 3 * factor]
  size = x.shape[axis]
  edges = [(0, 0)] * 4
  edges[axis] = (2, 2)
  padded = jnp.pad(x, edges, mode="edge")
  wide = jnp.promote_types(x.dtype, jnp.float32)
  taps = [lax.slice_in_dim(padded, k, k + size, axis=axis).astype(wide) for k in range(5)]
  phases = [sum(float(w) * tap for w, tap in zip(row, taps, strict=True) if w) for row in weights]
  shape = list(x.shape)
  shape[axis] *= factor
  return jnp.stack(phases, axis=axis + 1).reshape(shape).astype(x.dtype)


def pixel_shuffle(x: Float[Array, "b h w cff"], factor: int) -> Float[Array, "b hf wf c"]:
  """Turns channels into pixels: channel `(c, y, x)` of a cell is channel c of its pixel (y, x).

  Shi et al., arXiv:1609.05158; the order of the channels is PyTorch's.
  """
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, channels // factor**2, factor, factor)
  x = x.transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(batch, height * factor, width * factor, -1)
