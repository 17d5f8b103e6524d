"""TTSR. Yang et al., "Learning Texture Transformer Network for Image Super-Resolution", CVPR 2020.

arXiv:2006.04139: 4x super-resolution with textures of a reference image. TTSR and TTSR-rec differ
only in their losses. Numbers 1, 2 and 3 in names: maps with 1, 2 and 4 times the sides of the
low-resolution image.
"""

import functools
from collections.abc import Sequence
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from vit_jax_zoo.nn.init import pytorch_uniform
from vit_jax_zoo.nn.transformer import Stack
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.ops.resize import METHODS
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.ttsr.losses import VGG19, Conv, Maps
from vit_jax_zoo.systems.ttsr.search import BLOCK_SIZE, find_matches, transfer_levels

SCALE = 4  # ratio of the sides of output and input
# Outputs of the texture extractor: maps of the image's sides, a half and a quarter of them.
LEVELS = ("relu1_1", "relu2_1", "relu3_1")

# 64 channels and 16, 16, 8 and 4 blocks: the released code's options; the paper has no table.
VARIANTS: dict[str, dict[str, Any]] = {
  "ttsr": {"width": 64, "depths": (16, 16, 8, 4)},
  "ttsr_tiny": {"width": 16, "depths": (2, 2, 1, 1)},
}
"""Fields of `TTSR` by model name."""

SHARDING_RULES = ((r".*/bias", ()), (r".*", "fsdp"))


class TTSR(nn.Module):
  """Enlarges an image four times with textures of a reference (figures 2 and 3)."""

  width: int = 64  # channels of the maps (released code's n_feats)
  depths: tuple[int, int, int, int] = (16, 16, 8, 4)  # residual blocks (code's num_res_blocks)
  texture_widths: tuple[int, int, int] = (64, 128, 256)  # of the extractor's levels (VGG-19's)
  dtype: Dtype = "float32"  # of the computation; parameters, search and output are float32
  scan_layers: bool = True  # of residual blocks
  block_size: tuple[int, int] = BLOCK_SIZE  # see `search.find_matches`

  def setup(self) -> None:
    check_positive(self, "width", "depths", "texture_widths")
    self.extractor = VGG19(LEVELS, self.texture_widths, self.dtype)  # trained with the rest

  def __call__(
    self,
    low_res_image: Float[Array | np.ndarray, "b h w 3"],
    upsampled_image: Float[Array | np.ndarray, "b h4 w4 3"],
    ref_image: Float[Array | np.ndarray, "b y x 3"],
    blurred_ref_image: Float[Array | np.ndarray, "b y2 x2 3"],
    *,
    train: bool = False,
  ) -> dict[str, Any]:
    """Enlarges `low_res_image`; all images in [-1, 1], the reference's sides multiples of 4.

    `upsampled_image` is its bicubic enlargement, `blurred_ref_image` the reference, reduced and
    enlarged. `train` has no effect. Returns `image` float32 [b 4h 4w 3], in [-1, 1];
    `hard_attention` int32 [b h w], index of the matching cell, row by row, in a grid of a quarter
    of the reference's sides; `soft_attention` float32 [b h w], cosine of the match; `textures`, the
    transferred maps 1, 2 and 3.
    """
    del train
    given = (low_res_image, upsampled_image, ref_image, blurred_ref_image)
    _check_sizes(*given)
    low_res_image, upsampled_image, ref_image, blurred_ref_image = map(jnp.asarray, given)

    query = self.textures(shard_batch(upsampled_image), precise=True)[2]  # Eq. 1
    key = self.textures(shard_batch(blurred_ref_image), precise=True)[2]  # Eq. 2
    values = self.textures(shard_batch(ref_image))[::-1]  # Eq. 3
    hard, soft = find_matches(query, key, block_size=self.block_size)  # Eq. 4, 5 and 7
    textures = transfer_levels(values, hard)  # Eq. 6
    image = self.restore(low_res_image, soft, textures)
    attention = {"hard_attention": hard, "soft_attention": soft}
    return {"image": image, **attention, "textures": textures}

  def textures(self, images: Maps, *, precise: bool = False) -> tuple[Array, ...]:
    """Returns the texture extractor's features of images in [-1, 1], at `LEVELS`."""
    features = self.extractor(images, precise=precise)
    return tuple(features[level] for level in LEVELS)

  @nn.compact
  def restore(
    self, low_res_image: Maps, soft_attention: Float[Array, "b h w"], textures: Sequence[Array]
  ) -> Float[Array, "b h4 w4 3"]:
    """Returns the image of the stacked texture transformers (3.2, figure 3), after the search."""
    soft, conv = soft_attention[..., None], functools.partial(Conv, dtype=self.dtype)
    x = nn.relu(conv(self.width, name="head")(low_res_image))
    x1 = x + self._residual(0, "shallow")(x)
    self.sow("intermediates", "after_shallow", x1)

    x1 += self._attend(1, x1, textures[0], soft)
    x1 += self._residual(1, "stage1")(x1)

    x2 = nn.relu(pixel_shuffle(conv(4 * self.width, name="up2")(x1), 2))
    x2 += self._attend(2, x2, textures[1], upsample_bicubic(soft, 2))
    x1, x2 = self._integrate(2, [x1, x2])

    x3 = nn.relu(pixel_shuffle(conv(4 * self.width, name="up3")(x2), 2))
    x3 += self._attend(3, x3, textures[2], upsample_bicubic(soft, 4))
    x1, x2, x3 = self._integrate(3, [x1, x2, x3])
    image = MergeTail(self.width, self.dtype, name="merge_tail")(x1, x2, x3)
    image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    self.sow("intermediates", "unclipped", image)
    return jnp.clip(image, -1.0, 1.0)

  def _attend(self, scale: int, x: Array, texture: Array, soft: Array) -> Float[Array, "b h w c"]:
    """Returns Conv(Concat(F, T)) * S of Eq. 8, which is added to F."""
    conv = ConcatConv(self.width, self.dtype, name=f"attend{scale}")
    return conv(x, texture) * soft.astype(x.dtype)

  def _integrate(self, stage: int, maps: list[Array]) -> list[Array]:
    """Returns the maps plus residual blocks on their merged maps (CSFI)."""
    exchanged = Exchange(self.width, self.dtype, name=f"exchange{stage}")(maps)
    self.sow("intermediates", f"after_exchange{stage}", exchanged)
    return [
      x + self._residual(stage, f"stage{stage}_{i}")(e)
      for i, (x, e) in enumerate(zip(maps, exchanged, strict=True), 1)
    ]

  def _residual(self, stage: int, name: str) -> nn.Module:
    return ResidualStage(self.depths[stage], self.width, self.scan_layers, self.dtype, name=name)

  @property
  def reach(self) -> int:
    """Bound of the receptive field of `restore`: radius in pixels of the low-resolution image."""
    return 2 * sum(self.depths) + 21  # all convolutions and enlargements, as if on that grid


class Exchange(nn.Module):
  """Cross-scale feature integration (3.2): each map is merged with all others."""

  width: int  # channels of each map
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, maps: Sequence[Float[Array, "b ..."]]) -> list[Float[Array, "b ..."]]:
    """Merges maps of growing size, each twice the one before."""
    merged = []
    for target, own in enumerate(maps, 1):
      others = [i for i in range(1, len(maps) + 1) if i != target]
      moved = [self._move(maps[i - 1], i, target) for i in others]
      factors = [1, *(2 ** max(target - i, 0) for i in others)]
      merge = ConcatConv(self.width, dtype=self.dtype, name=f"merge{target}")
      merged.append(nn.relu(merge(own, *moved, factors=factors)))
    return merged

  def _move(self, x: Maps, source: int, target: int) -> Array:
    name = f"from{source}_to{target}"
    if source < target:
      return Conv(self.width, 1, dtype=self.dtype, name=name)(x)
    for halving in range(source - target):
      suffix = "ab"[halving] if source - target > 1 else ""
      x = nn.relu(Conv(self.width, stride=2, dtype=self.dtype, name=name + suffix)(x))
    return x


class MergeTail(nn.Module):
  """Merges the three maps to an image."""

  width: int  # channels of each map
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x1: Maps, x2: Array, x3: Array) -> Float[Array, "b h4 w4 3"]:
    x1 = Conv(self.width, 1, dtype=self.dtype, name="from1")(x1)
    x2 = Conv(self.width, 1, dtype=self.dtype, name="from2")(x2)
    merge = ConcatConv(self.width, dtype=self.dtype, name="merge")
    merged = nn.relu(merge(x3, x1, x2, factors=(1, 4, 2)))
    narrow = Conv(self.width // 2, dtype=self.dtype, name="narrow")(merged)
    return Conv(3, 1, dtype=self.dtype, name="image")(narrow)


class ResidualStage(nn.Module):
  """Residual blocks and a convolution; the caller adds the input."""

  depth: int
  width: int
  scan_layers: bool = True
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Maps) -> Maps:
    make = functools.partial(ResidualBlock, self.width, self.dtype)
    blocks = Stack(make, self.depth, self.scan_layers)
    nn.share_scope(self, blocks)
    return Conv(self.width, dtype=self.dtype, name="tail")(blocks(x)[0])


class ResidualBlock(nn.Module):
  """x + conv(relu(conv(x))), without norms."""

  width: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Maps) -> tuple[Maps, None]:
    out = nn.relu(Conv(self.width, dtype=self.dtype, name="conv1")(shard_batch(x)))
    return x + Conv(self.width, dtype=self.dtype, name="conv2")(out), None


class ConcatConv(nn.Module):
  """`Conv` of concatenated maps, computed as the sum of a convolution of each.

  The concatenation would be the largest array: each map is enlarged just before its convolution.
  """

  features: int
  dtype: Dtype = "float32"  # of the products, which are summed in float32

  @nn.compact
  def __call__(self, *maps: Array, factors: Sequence[int] | None = None) -> Float[Array, "b h w f"]:
    """Convolves maps, 3x3; those with a factor above 1 are enlarged by it before, with a ReLU."""
    widths = [x.shape[-1] for x in maps]
    init = pytorch_uniform(9 * sum(widths))
    kernel = self.param("kernel", init, (3, 3, sum(widths), self.features), "float32")
    bias = self.param("bias", init, (self.features,), "float32")
    wide = jnp.promote_types(self.dtype, jnp.float32)
    total, first = jnp.asarray(bias, wide).reshape(1, 1, 1, -1), 0
    for x, width, factor in zip(maps, widths, factors or [1] * len(maps), strict=True):
      x, total = lax.optimization_barrier((x, total))  # one after the other
      if factor > 1:  # the paper's 1x1 convolution before it commutes with bicubic enlargement
        x = nn.relu(upsample_bicubic(x, factor))
      part = jnp.asarray(kernel[:, :, first : first + width], self.dtype)
      fields = {"padding": ((1, 1), (1, 1)), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
      product = lax.conv_general_dilated(x.astype(self.dtype), part, (1, 1), **fields)
      total, first = total + product.astype(wide), first + width
    return total.astype(self.dtype)


def upsample_bicubic(x: Maps, factor: int) -> Float[Array, "b hf wf c"]:
  """Enlarges a map as PyTorch's `interpolate(mode="bicubic", align_corners=False)`.

  a = -0.75 (Pillow's and JAX's filters have -0.5), half-pixel centres, edges repeated.
  """
  for axis in (1, 2):
    # Every pixel has `factor` outputs, with the same weights of it and two on either side.
    weights = METHODS["bicubic"](5, 5 * factor)[2 * factor : 3 * factor]
    size, edges = x.shape[axis], [(0, 0)] * 4
    edges[axis] = (2, 2)
    padded = jnp.pad(x, edges, mode="edge").astype(jnp.promote_types(x.dtype, jnp.float32))
    taps = [lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(5)]
    phases = [sum(float(w) * tap for w, tap in zip(row, taps, strict=True) if w) for row in weights]
    shape = [side * factor if i == axis else side for i, side in enumerate(x.shape)]
    x = jnp.stack(phases, axis=axis + 1).reshape(shape).astype(x.dtype)
  return x


def pixel_shuffle(x: Float[Array, "b h w cff"], factor: int) -> Float[Array, "b hf wf c"]:
  """Moves channels to pixels in PyTorch's order, arXiv:1609.05158."""
  return einops.rearrange(x, "b h w (c y x) -> b (h y) (w x) c", y=factor, x=factor)


def _check_sizes(*images: Array | np.ndarray) -> None:
  sizes = [image.shape[1:3] for image in images]
  low_res, upsampled, ref, blurred = ("x".join(map(str, size)) for size in sizes)
  expected = "x".join(str(SCALE * side) for side in sizes[0])
  if upsampled != expected:
    wrong = f"upsampled_image: its size is {upsampled}"
    raise ValueError(f"{wrong}; expected {expected} for a low_res_image of {low_res}")
  if any(side % SCALE or not side for side in sizes[2]):
    raise ValueError(f"ref_image: its size is {ref}; expected multiples of {SCALE}")
  if blurred != ref:
    raise ValueError(f"blurred_ref_image: its size is {blurred}; expected that of ref_image, {ref}")
