"""Images as sequences of colours out of a palette, on the device.

Section 3.2 of iGPT (Chen et al., 2020): every pixel is replaced by the nearest of 512 colours, so
that an image is a third as long as its three channels would be. `palette` is the same on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8


def spread_clusters(count: int) -> np.ndarray:
  """Returns float32 [count 3] in [-1, 1]: colours spread evenly over the cube, for want of better.

  The additive sequence whose steps are powers of the inverse of the root of
  x^4 = x + 1: the first `count` points leave no large gap for any `count`.
  """
  root = 1.2207440846057596
  steps = root ** -np.arange(1.0, 4.0)
  return (2.0 * ((0.5 + np.arange(1, count + 1)[:, None] * steps) % 1.0) - 1.0).astype(np.float32)


def nearest_cluster(
  images: Float[Array, "b h w 3"], clusters: Float[Array, "k 3"]
) -> Int[Array, "b h w"]:
  """Returns the index of the nearest colour of each pixel, the first of them where several are.

  Distances are summed channel by channel as squares of differences: no matrix product, so that
  accelerators which multiply matrices in 16 bits find the same colour; no array over pixels x
  colours x channels; and XLA fuses the rest into the search for the smallest.

  Args:
    images: in [-1, 1].
    clusters: in [-1, 1].
  """
  distances = jnp.zeros((), jnp.float32)
  for channel in range(3):
    pixels = images[..., channel, None].astype(jnp.float32)
    distances = distances + jnp.square(pixels - clusters[None, None, None, :, channel])
  return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def cluster_colors(
  tokens: Int[Array, "*shape"], clusters: Float[Array, "k 3"]
) -> UInt8[Array, "*shape 3"]:
  """Returns the colours of tokens as pixels in [0, 255]."""
  colors = jnp.rint(127.5 * (clusters.astype(jnp.float32) + 1.0))
  return jnp.clip(colors, 0, 255).astype(jnp.uint8)[tokens]


def raster(images: Int[Array, "b h w"]) -> Int[Array, "b n"]:
  """Lays the rows of an image one after the other, top row first."""
  return jax.lax.reshape(images, (images.shape[0], images.shape[1] * images.shape[2]))
