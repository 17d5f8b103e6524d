"""TTSR. Yang et al., "Learning Texture Transformer Network for Image Super-Resolution", CVPR 2020.

arXiv:2006.04139. A small picture is enlarged four times with the help of a large reference picture
that shows similar things: for each of its patches the most similar one of the reference is found,
and the reference's features are carried over where the match is good. TTSR and TTSR-rec are one
network; they differ in the losses it was trained with (`tasks.super_resolution`).

Numbers 1, 2 and 3 stand for maps of the small picture's size, twice and four times that.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.conv import Conv
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.ttsr.concat_conv import JointConv
from vit_jax_zoo.systems.ttsr.search import BLOCK_SIZE, find_matches, transfer
from vit_jax_zoo.systems.ttsr.upsample import pixel_shuffle, upsample_bicubic
from vit_jax_zoo.systems.ttsr.vgg import VGG19

SCALE = 4
"""Times that sides grow; the only one that there is."""

LEVELS = ("relu1_1", "relu2_1", "relu3_1")
"""What of VGG-19 is a texture: maps of the picture's sides, a half and a quarter of them."""

# 64 channels and 16, 16, 8 and 4 blocks: the released code's options; the paper gives no table.
VARIANTS: dict[str, dict[str, Any]] = {
  "ttsr": {"width": 64, "depths": (16, 16, 8, 4)},
  "ttsr_tiny": {"width": 16, "depths": (2, 2, 1, 1)},
}
"""Fields of `TTSR` by model name."""

SHARDING_RULES = (
  (r".*/bias", ()),
  (r".*", "fsdp"),
)
"""Kernels split over `fsdp`; biases kept whole."""


class ResidualBlock(nn.Module):
  """Two convolutions around a ReLU, beside the identity; no norm.

  Attributes:
    width: channels.
    residual_scale: factor of what is added.
    dtype: of the computation.
  """

  width: int
  residual_scale: float = 1.0
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], _: None = None
  ) -> tuple[Float[Array, "b h w c"], None]:
    """Returns the map, and nothing for `nn.scan` to stack."""
    out = nn.relu(Conv(self.width, dtype=self.dtype, name="conv1")(shard_batch(x)))
    out = Conv(self.width, dtype=self.dtype, name="conv2")(out)
    return x + self.residual_scale * out, None


class ResidualStage(nn.Module):
  """Residual blocks and a last convolution.

  Attributes:
    depth: number of blocks.
    width: channels.
    residual_scale: see `ResidualBlock`.
    scan_layers: one block compiled and run `depth` times, or `depth` blocks.
    dtype: of the computation.
  """

  depth: int
  width: int
  residual_scale: float = 1.0
  scan_layers: bool = True
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns what the caller adds to its own map."""
    fields = {
      "width": self.width, "residual_scale": self.residual_scale, "dtype": self.dtype
    }  # fmt: skip
    if self.scan_layers:
      scan = nn.scan(
        ResidualBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
      )
      x, _ = scan(**fields, name="blocks")(x, None)
    else:
      for i in range(self.depth):
        x, _ = ResidualBlock(**fields, name=f"block_{i}")(x)
    return Conv(self.width, dtype=self.dtype, name="tail")(x)


class Exchange(nn.Module):
  """Cross-scale feature integration (section 3.2): each map takes up what the others hold.

  Attributes:
    width: channels of each map.
    dtype: of the computation.
  """

  width: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, maps: Sequence[Float[Array, "b ..."]]) -> list[Float[Array, "b ..."]]:
    """Takes and returns maps of growing size, each twice the one before."""
    merged = []
    for target, own in enumerate(maps, 1):
      others = [(i, x) for i, x in enumerate(maps, 1) if i != target]
      moved = [self._move(x, i, target) for i, x in others]
      factors = [1, *(2 ** max(target - i, 0) for i, _ in others)]
      merge = JointConv(self.width, dtype=self.dtype, name=f"merge{target}")
      merged.append(nn.relu(merge(own, *moved, factors=factors)))
    return merged

  def _move(self, x: Float[Array, "b h w c"], source: int, target: int) -> Float[Array, "b ..."]:
    """Brings a map down to the target's size, or readies it to be enlarged to that."""
    name = f"from{source}_to{target}"
    if source < target:
      return Conv(self.width, 1, dtype=self.dtype, name=name)(x)
    for halving in range(source - target):
      suffix = "ab"[halving] if source - target > 1 else ""
      x = nn.relu(Conv(self.width, stride=2, dtype=self.dtype, name=name + suffix)(x))
    return x


class MergeTail(nn.Module):
  """From three maps to a picture.

  Attributes:
    width: channels of each map.
    dtype: of the computation.
  """

  width: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x1: Float[Array, "b h w c"], x2: Float[Array, "b ..."], x3: Float[Array, "b ..."]
  ) -> Float[Array, "b h4 w4 3"]:
    """Returns a picture, not yet clipped."""
    x1 = Conv(self.width, 1, dtype=self.dtype, name="from1")(x1)
    x2 = Conv(self.width, 1, dtype=self.dtype, name="from2")(x2)
    merge = JointConv(self.width, dtype=self.dtype, name="merge")
    merged = nn.relu(merge(x3, x1, x2, factors=(1, 4, 2)))
    narrow = Conv(self.width // 2, dtype=self.dtype, name="narrow")(merged)
    return Conv(3, 1, dtype=self.dtype, name="image")(narrow)


class TTSR(nn.Module):
  """Enlarges a picture four times, taking textures from a reference (Figures 2 and 3).

  Attributes:
    width: channels of the maps.
    depths: residual blocks on the small picture before textures come in, and of stages 1, 2 and 3.
    residual_scale: factor of what a residual block adds.
    texture_widths: channels of the texture extractor's three levels, VGG-19's.
    dtype: of the computation. Parameters, the search for matches with all that leads up to it, and
      the picture are float32: in bfloat16 the features already would name other patches.
    scan_layers: see `ResidualStage`.
    block_size: see `ops.relevance.find_matches`.
  """

  width: int = 64
  depths: tuple[int, int, int, int] = (16, 16, 8, 4)
  residual_scale: float = 1.0
  texture_widths: tuple[int, int, int] = (64, 128, 256)
  dtype: Dtype = "float32"
  scan_layers: bool = True
  block_size: tuple[int, int] = BLOCK_SIZE

  def setup(self) -> None:
    """Makes the texture extractor; it begins as VGG-19 and is trained with the rest."""
    check_positive(self, "width", "depths", "texture_widths")
    self.extractor = VGG19(LEVELS, self.texture_widths, self.dtype)

  def textures(
    self, images: Float[Array, "b h w 3"], *, precise: bool = False
  ) -> tuple[Float[Array, "b ..."], ...]:
    """Returns the learnable extractor's features of pictures in [-1, 1], at `LEVELS`."""
    found = self.extractor(images, precise=precise)
    return tuple(found[level] for level in LEVELS)

  @property
  def reach(self) -> int:
    """How far, in pixels of the small picture, a result can depend on picture and matches.

    An upper bound: all convolutions on the way, two for each residual block, and the bicubic
    enlargements, as if all were on the small picture's grid.
    """
    return 2 * sum(self.depths) + 21

  def __call__(
    self,
    low_res_image: Float[Array | np.ndarray, "b h w 3"],
    upsampled_image: Float[Array | np.ndarray, "b h4 w4 3"],
    ref_image: Float[Array | np.ndarray, "b y x 3"],
    blurred_ref_image: Float[Array | np.ndarray, "b y2 x2 3"],
    *,
    train: bool = False,
  ) -> dict[str, Any]:
    """Enlarges `low_res_image`. Pictures hold values in [-1, 1].

    Args:
      low_res_image: the picture to enlarge, of any sides.
      upsampled_image: the same, enlarged bicubically to four times its sides.
      ref_image: the reference; its sides are multiples of 4.
      blurred_ref_image: the reference made four times smaller, then enlarged again.
      train: has no effect.

    Returns:
      `image` float32 [b 4h 4w 3], in [-1, 1]; `hard_attention` int32 [b h w], the matching cell of
      the reference, counted row by row on a grid of a quarter of its sides; `soft_attention`
      float32 [b h w], the cosine of the match; `textures`, three maps with 1, 2 and 4 times the
      sides of the small picture, taken from the reference.

    Raises:
      ValueError: the pictures' sides do not belong together.
    """
    del train
    pictures = (low_res_image, upsampled_image, ref_image, blurred_ref_image)
    low_res_image, upsampled_image, ref_image, blurred_ref_image = map(jnp.asarray, pictures)
    _check(*(picture.shape for picture in pictures))
    match = find_matches(
      self.textures(shard_batch(upsampled_image), precise=True)[2],
      self.textures(shard_batch(blurred_ref_image), precise=True)[2],
      block_size=self.block_size,
    )
    grid_width = ref_image.shape[2] // SCALE
    textures = [
      transfer(features, match.index, grid_width=grid_width, scale=scale)
      for features, scale in zip(
        self.textures(shard_batch(ref_image))[::-1], (1, 2, 4), strict=True
      )
    ]
    return {
      "image": self.restore(low_res_image, match.relevance, textures),
      "hard_attention": match.index,
      "soft_attention": match.relevance,
      "textures": tuple(textures),
    }

  @nn.compact
  def restore(
    self,
    low_res_image: Float[Array, "b h w 3"],
    soft_attention: Float[Array, "b h w"],
    textures: Sequence[Float[Array, "b ..."]],
  ) -> Float[Array, "b h4 w4 3"]:
    """Three texture transformers, stacked (section 3.2, Figure 3): what follows the search.

    Args:
      low_res_image: in [-1, 1].
      soft_attention: how far to trust each patch's match.
      textures: what was transferred, maps of the picture's sides and twice and four times these.

    Returns:
      the enlarged picture, float32, in [-1, 1].
    """
    relevance = soft_attention[..., None]
    x = nn.relu(self._conv("head", self.width)(low_res_image))
    x1 = x + self._stage(0, "shallow")(x)
    self.sow("intermediates", "after_shallow", x1)

    x1 += self._attend(1, x1, textures[0], relevance)
    x1 += self._stage(1, "stage1")(x1)

    x2 = nn.relu(pixel_shuffle(self._conv("up2", 4 * self.width)(x1), 2))
    x2 += self._attend(2, x2, textures[1], upsample_bicubic(relevance, 2))
    x1, x2 = self._integrate(2, [x1, x2])

    x3 = nn.relu(pixel_shuffle(self._conv("up3", 4 * self.width)(x2), 2))
    x3 += self._attend(3, x3, textures[2], upsample_bicubic(relevance, 4))
    x1, x2, x3 = self._integrate(3, [x1, x2, x3])
    image = MergeTail(self.width, self.dtype, name="merge_tail")(x1, x2, x3)
    image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    self.sow("intermediates", "unclipped", image)
    return jnp.clip(image, -1.0, 1.0)

  def _attend(
    self,
    scale: int,
    x: Float[Array, "b h w c"],
    texture: Float[Array, "b h w t"],
    relevance: Float[Array, "b h w 1"],
  ) -> Float[Array, "b h w c"]:
    """Soft attention (section 3.1): what the texture adds, as far as the match is to be trusted."""
    attend = JointConv(self.width, dtype=self.dtype, name=f"attend{scale}")
    return attend(x, texture) * relevance.astype(x.dtype)

  def _integrate(
    self, stage: int, maps: list[Float[Array, "b ..."]]
  ) -> list[Float[Array, "b ..."]]:
    """Exchanges between the maps, and residual blocks on each, beside the identity."""
    exchanged = Exchange(self.width, self.dtype, name=f"exchange{stage}")(maps)
    self.sow("intermediates", f"after_exchange{stage}", exchanged)
    return [
      x + self._stage(stage, f"stage{stage}_{i}")(e)
      for i, (x, e) in enumerate(zip(maps, exchanged, strict=True), 1)
    ]

  def _stage(self, number: int, name: str) -> ResidualStage:
    return ResidualStage(
      self.depths[number],
      self.width,
      self.residual_scale,
      self.scan_layers,
      self.dtype,
      name=name,
    )

  def _conv(self, name: str, features: int) -> Conv:
    return Conv(features, dtype=self.dtype, name=name)


def _check(
  low_res: tuple[int, ...],
  upsampled: tuple[int, ...],
  ref: tuple[int, ...],
  blurred: tuple[int, ...],
) -> None:
  """Raises ValueError for sides that do not belong together; shapes are [b h w 3]."""
  if upsampled[1:3] != (SCALE * low_res[1], SCALE * low_res[2]):
    raise ValueError(
      f"a picture of {low_res[1]}x{low_res[2]} came with an enlarged one of "
      f"{upsampled[1]}x{upsampled[2]}; expected {SCALE * low_res[1]}x{SCALE * low_res[2]}"
    )
  if ref[1] % SCALE or ref[2] % SCALE or not ref[1] or not ref[2]:
    raise ValueError(
      f"a reference of {ref[1]}x{ref[2]} was given; crop or pad its sides to multiples of {SCALE}"
    )
  if blurred != ref:
    raise ValueError(
      f"the blurred reference is {blurred[1]}x{blurred[2]}, the reference {ref[1]}x{ref[2]}; "
      "both must have the same sides"
    )
