"""Colour quantization: palettes fitted by k-means (iGPT, section 3.2), nearest colours of pixels.

A palette is float32 [k 3] with values in [-1, 1], as OpenAI's `kmeans_centers.npy`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, Int, UInt8

from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.weights.readers import read_json, read_npy

Clusters = Float[Array, "k 3"]


def spread_clusters(count: int) -> np.ndarray:
  """Returns float32 [count 3] in [-1, 1]: colours spread evenly over the cube, an initial palette.

  The R3 low-discrepancy sequence, whose steps are powers of the inverse of the root of x^4 = x + 1.
  """
  root = 1.2207440846057596
  steps = root ** -np.arange(1.0, 4.0)
  return (2.0 * ((0.5 + np.arange(1, count + 1)[:, None] * steps) % 1.0) - 1.0).astype(np.float32)


def nearest_cluster(images: Float[Array, "b h w 3"], clusters: Clusters) -> Int[Array, "b h w"]:
  """Returns the index of the nearest colour of each pixel, in [-1, 1], the first of equals.

  Summed channel by channel: exact on accelerators that multiply matrices in 16 bits, without an
  array over pixels x colours x channels; XLA fuses the rest into the argmin.
  """
  distances = jnp.zeros((), jnp.float32)
  for channel in range(3):
    pixels = images[..., channel, None].astype(jnp.float32)
    distances = distances + jnp.square(pixels - clusters[None, None, None, :, channel])
  return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def cluster_colors(tokens: Int[Array, "*b"], clusters: Clusters) -> UInt8[Array, "*b 3"]:
  """Returns the colours of tokens as pixels in [0, 255]."""
  colors = jnp.rint(127.5 * (clusters.astype(jnp.float32) + 1.0))
  return jnp.clip(colors, 0, 255).astype(jnp.uint8)[tokens]


def fit_palette(
  pixels: UInt8[np.ndarray, "... 3"], num_colors: int, *, seed: int = 0
) -> Float32[np.ndarray, "k 3"]:
  """Returns the k-means clusters of pixels, RGB in [0, 255], from dark to bright.

  Equal pixels are one point with a weight. Raises ValueError for fewer colours than the palette's.
  """
  from sklearn.cluster import KMeans  # slow to import

  codes = pixels.reshape(-1, 3).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
  codes, counts = np.unique(codes, return_counts=True)
  if len(codes) < num_colors:
    wrong = f"num_colors: {num_colors}, but the images have {len(codes)} different colours"
    raise ValueError(f"{wrong}. Set num_colors={len(codes)} or fewer")
  colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1) / 127.5 - 1.0
  if len(codes) > num_colors:
    means = KMeans(num_colors, n_init=1, max_iter=100, random_state=seed)
    colors = means.fit(colors, sample_weight=counts).cluster_centers_
  brightness = colors @ np.array([0.299, 0.587, 0.114])
  return colors[np.argsort(brightness, kind="stable")].astype(np.float32)


@jax.jit
def encode(
  images: UInt8[Array | np.ndarray, "b h w 3"], palette: Float[Array | np.ndarray, "k 3"]
) -> Int[Array, "b h w"]:
  """Returns the index of the nearest colour of each pixel, image by image to save memory."""
  singles, clusters = jnp.asarray(images)[:, None], jnp.asarray(palette)
  return jax.lax.map(lambda x: nearest_cluster(normalize_images(x), clusters), singles)[:, 0]


def read_palette(path: str) -> Float32[np.ndarray, "k 3"]:
  """Reads a palette: OpenAI's `kmeans_centers.npy`, or `clusters` in HF's processor's JSON."""
  file = epath.Path(path)
  if not file.exists() or pathlib.Path(file).is_fifo():
    raise FileNotFoundError(f"{path}: no such file. Leave the palette out to fit one to the images")
  if file.suffix == ".json":
    fields = read_json(file)
    if "clusters" not in fields:
      raise ValueError(f"{file}: no field 'clusters'; expected ImageGPT's image processor")
    clusters = np.asarray(fields["clusters"], np.float32)
  else:
    try:
      with file.open("rb") as stream:
        clusters = read_npy(stream, file.stat().length, file.name)
    except (ValueError, EOFError) as error:
      raise ValueError(f"{file}: not a .npy array ({error})") from None
  if clusters.ndim != 2 or clusters.shape[1] != 3 or not len(clusters):
    raise ValueError(f"{path}: shape {clusters.shape}; expected (colours, 3)")
  if not np.abs(clusters).max() <= 1:
    low, high = clusters.min(), clusters.max()
    raise ValueError(f"{path}: values from {low:g} to {high:g}; expected [-1, 1]")
  return clusters.astype(np.float32)
