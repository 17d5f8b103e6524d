"""`weights.Preprocess` in jnp, for programs whose images have any size.

Height and width may be symbolic: both axes are resized by matrices that are computed from them.
Grey levels are within 1 of `Preprocess.resize`, and within 2 for "opencv", whose area filter is
another one where an axis is enlarged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vit_jax_zoo.data.images import AREA_FROM, BLUR_FROM
from vit_jax_zoo.weights import Preprocess


def _cubic(x: Array) -> Array:
  x = jnp.abs(x)
  near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _sinc(x: Array, reach: int) -> Array:
  return jnp.where(jnp.abs(x) < reach, jnp.sinc(x), 0)


_KERNELS: dict[str, Callable[[Array], Array]] = {  # Pillow's
  "bilinear": lambda x: jnp.maximum(1 - jnp.abs(x), 0),
  "bicubic": _cubic,
  "lanczos": lambda x: _sinc(x, 3) * jnp.sinc(x / 3),
  "hamming": lambda x: _sinc(x, 1) * (0.54 + 0.46 * jnp.cos(jnp.pi * x)),
  "box": lambda x: jnp.where((x > -0.5) & (x <= 0.5), 1.0, 0.0),
}


def resize(
  images: UInt8[Array, "b h w 3"], preprocess: Preprocess, size: tuple[int, int]
) -> tuple[Float[Array, "b H W c"], Float[Array, "2"], Float[Array, "2"]]:
  """Resizes and crops RGB images, or pads them to `size` with zeros at the right and bottom.

  Also returns height and width of the resized image, without the padding, and of the given one.
  """
  x = images.astype(jnp.float32)
  if preprocess.channels == 1:
    x = jnp.floor(x @ jnp.array([[19595.0], [38470.0], [7471.0]]) / 65536 + 0.5)
  # Not jnp.arange: ONNX converters have no dimension as a value.
  axes = [jnp.cumsum(jnp.ones((1, side), x.dtype), axis=1) - 0.5 for side in x.shape[1:3]]
  counts = [pixels[0, -1] + 0.5 for pixels in axes]
  resized = resized_size(preprocess, *counts)
  scales = [old / new for old, new in zip(counts, resized, strict=True)]
  is_area = jnp.maximum(*scales) > AREA_FROM
  corner = jnp.floor if preprocess.rounding in ("ratio", "nearest") else jnp.rint
  method, rounds = preprocess.interpolation, not preprocess.interpolation.startswith("tf_")
  if method == "opencv":
    x = _blur(_blur(x, scales[0], is_area, 1), scales[1], is_area, 2)
  for axis in (1, 0):  # Pillow's order: columns first
    new = jnp.arange(size[axis]) + 0.5
    if preprocess.has_fixed_size:
      new += corner((resized[axis] - size[axis]) / 2)
    weights = _weights(axes[axis], counts[axis], new, resized[axis], method, is_area)
    weights = jnp.where(new[:, None] < resized[axis], weights, 0)
    x = jnp.einsum(
      "bhwc,yh->bywc" if axis == 0 else "bhwc,xw->bhxc", x, weights, precision="highest"
    )
    if rounds and (method != "opencv" or axis == 0):
      x = jnp.clip(jnp.floor(x + 0.5), 0, 255)
  x = jnp.floor(jnp.clip(x, 0, 255)) if preprocess.truncate else x
  return x, jnp.stack(resized), jnp.stack(counts)


def resized_size(preprocess: Preprocess, height: Array, width: Array) -> list[Array]:
  """Returns height and width before a crop or padding, as `Preprocess.resized_size`."""
  sides, targets, rounding = [height, width], preprocess.uncropped_size, preprocess.rounding
  if preprocess.fit == "squash":
    return [jnp.float32(side) for side in targets]
  if preprocess.fit == "inside":
    scale, rounding = jnp.minimum(targets[0] / height, targets[1] / width), "floor"
  elif preprocess.fit == "crop" and targets[0] != targets[1]:
    scale, rounding = jnp.maximum(targets[0] / height, targets[1] / width), "nearest"
  else:
    short, long = jnp.minimum(height, width), jnp.maximum(height, width)
    limit = preprocess.max_side if preprocess.fit == "shorter_side" else None
    scale = jnp.minimum(targets[0] / short, (limit or jnp.inf) / long)
    if rounding in ("side", "ratio"):
      side = jnp.rint(short * scale)
      other = jnp.floor(side * long / short if rounding == "side" else long * scale + 1e-4)
      return [jnp.where(x == short, side, other) for x in sides]
  rounded = jnp.rint if rounding == "nearest" else lambda x: jnp.floor(x + 1e-4)
  return [jnp.maximum(rounded(side * scale), 1) for side in sides]


def _weights(
  pixels: Array, count: Array, centres: Array, resized: Array, method: str, is_area: Array
) -> Float[Array, "new old"]:
  """Returns the weight of each pixel in each resized one; `centres` in resized pixels."""
  centres, scale = (centres * count / resized)[:, None], count / resized
  if method == "nearest":
    return (pixels == jnp.floor(centres) + 0.5).astype(jnp.float32)
  first, last = centres - scale / 2, centres + scale / 2
  area = jnp.minimum(pixels + 0.5, last) - jnp.maximum(pixels - 0.5, first)
  area = jnp.maximum(area, 0) / scale
  if method == "tf_area":
    return area
  width = jnp.maximum(scale, 1)
  if method in ("tf_bilinear", "opencv"):  # not antialiased; edges are repeated
    centres, width = jnp.clip(centres, 0.5, count - 0.5), 1
  kernel = _KERNELS.get(method, _KERNELS["bilinear"])
  weights = kernel((pixels - centres) / width)
  weights = weights / jnp.sum(weights, axis=1, keepdims=True)
  return jnp.where(is_area, area, weights) if method == "opencv" else weights


def _blur(x: Array, scale: Array, is_area: Array, axis: int) -> Array:
  """Blurs an axis that shrinks by `scale`, as `data.images.resize`."""
  weight = jnp.where(is_area | (scale <= BLUR_FROM), 0.0, (scale**2 - 1) / 12)
  inner = [jax.lax.slice_in_dim(x, *ends, axis=axis) for ends in ((0, -1), (1, None))]
  edges = [jax.lax.slice_in_dim(x, *ends, axis=axis) for ends in ((1, 2), (-2, -1))]  # reflected
  both = sum(jnp.concatenate(parts, axis) for parts in ((edges[0], inner[0]), (inner[1], edges[1])))
  return jnp.rint((1 - 2 * weight) * x + weight * both)
