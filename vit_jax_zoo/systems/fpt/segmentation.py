"""FPT for semantic segmentation. Zhang et al., "Feature Pyramid Transformer", arXiv:2007.09451.

A dilated ResNet, a pyramid of four maps of one size that differ in how far they reach, the feature
pyramid transformer on it, whose fine levels look at coarse ones in a window around themselves, and
a class for every pixel. (Detection and instance segmentation with the same transformer: see
`models.rcnn`; the transformer itself: `layers.feature_pyramid_transformer`.)

The authors released no code of their segmentation networks. What the paper leaves open is chosen as
usual for networks of this kind: the four levels are joined by a 3x3 convolution in front of the
classifier, and an auxiliary one may stand on c4 (Zhao et al., arXiv:1612.01105, section 3.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import part_fields, unknown_name
from vit_jax_zoo.nn.init import kaiming_normal
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, ConvNorm, ResNet
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer


class GlobalConvolution(nn.Module):
  """A large kernel as a sum of two products: a column after a row, and a row after a column.

  Attributes:
    features: output channels.
    kernel_size: its side, odd; 1 is a single 1x1 convolution.
    dtype: of the computation.
  """

  features: int
  kernel_size: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Returns a map of the same size."""
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise ValueError(f"kernels of the pyramid must be odd, not {self.kernel_size}")
    if self.kernel_size == 1:
      return self._conv((1, 1), "conv")(x)
    column, row = (self.kernel_size, 1), (1, self.kernel_size)
    one = self._conv(row, "column_row")(self._conv(column, "column")(x))
    return one + self._conv(column, "row_column")(self._conv(row, "row")(x))

  def _conv(self, size: tuple[int, int], name: str) -> nn.Module:
    padding = tuple((side // 2, side // 2) for side in size)
    return nn.Conv(
      self.features, size, padding=padding, kernel_init=kaiming_normal, dtype=self.dtype, name=name
    )


class UnscathedPyramid(nn.Module):
  """As many levels as there are kernels, each of the size of the map that they are made of.

  Attributes:
    width: channels of each level.
    kernel_sizes: of the levels' global convolutions, from the finest level to the coarsest.
    norm: behind them, a name that `norm_factory` knows.
    dtype: of the computation.
  """

  width: int = 256
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)
  norm: str = "batch_norm"
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> tuple[Float[Array, "b h w d"], ...]:
    """Returns the levels, the one of the smallest reach first."""
    make_norm = norm_factory(self.norm, dtype=self.dtype)
    levels = []
    for index, size in enumerate(self.kernel_sizes):
      level = GlobalConvolution(self.width, size, self.dtype, name=f"branch_{index}")(x)
      level = make_norm(name=f"norm_{index}")(level, train=train)
      levels.append(shard_batch(jnp.maximum(level, 0)))
    return tuple(levels)


def _variant(depth: int, **fields: Any) -> dict[str, Any]:
  return {"backbone": {"blocks": RESNET_BLOCKS[depth], "output_stride": 8}, **fields}


VARIANTS: dict[str, dict[str, Any]] = {
  **{f"fpt_segmentation_r{depth}": _variant(depth) for depth in (50, 101)},
  **{f"fpt_segmentation_r{depth}_ufp": _variant(depth, neck="ufp") for depth in (50, 101)},
  "fpt_pyramid": {},
  "fpt_pyramid_official": {"flavor": "official"},
  "fpt_pyramid_official_gn": {"flavor": "official", "norm": "group_norm"},
}
"""Fields by model name: of `PyramidSegmenter`, "ufp" being the same without the transformer; and of
the `FeaturePyramidTransformer` alone, which takes a pyramid in place of images."""

SHARDING_RULES = (
  (r".*/(bias|scale|mixture)", ()),
  (r".*", "fsdp"),
)
"""Kernels split over `fsdp`; everything small is kept whole."""

NECKS = ("fpt", "ufp")


class PyramidSegmenter(nn.Module):
  """Names the class of every pixel.

  Attributes:
    num_classes: number of classes.
    width: channels of the pyramid's levels.
    kernel_sizes: of the pyramid's global convolutions, from the finest level to the coarsest.
    neck: "fpt", or "ufp": the pyramid alone, to compare with.
    window: side of the window in which a fine level looks at a coarse one; None: everywhere. The
      paper's value is not known to us.
    transformer: further fields of `FeaturePyramidTransformer`.
    norm: of all that stands on the backbone; see `norm_factory`.
    dropout_rate: before the classifier.
    auxiliary_head: also classifies from c4, while training.
    backbone: fields of `ResNet`. "output_stride" 8 keeps maps at an eighth of the image's sides.
    dtype: of the computation. Parameters, norms' statistics, softmaxes and logits are float32.
  """

  num_classes: int = 19
  width: int = 256
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)
  neck: str = "fpt"
  window: int | None = 5
  transformer: Mapping[str, Any] | None = None
  norm: str = "batch_norm"
  dropout_rate: float = 0.1
  auxiliary_head: bool = False
  backbone: Mapping[str, Any] | None = None
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> dict[str, Float[Array, "b i j k"]]:
    """Segments images.

    Args:
      images: normalised with ImageNet's mean and standard deviation.
      train: norms take this batch's statistics (and renew "batch_stats", which must then be
        mutable); dropout draws from the "dropout" stream.

    Returns:
      `logits` float32 [b i j num_classes], of the size of the backbone's last map: enlarge them by
      the stride, bilinearly, and cut them to the images. With an auxiliary head, while training,
      `auxiliary_logits`, too.
    """
    if self.neck not in NECKS:
      raise ValueError(unknown_name("neck", self.neck, NECKS))
    check_positive(self, "num_classes", "width", "kernel_sizes")
    check_rates(self, "dropout_rate")
    backbone: dict[str, Any] = {
      "output_stride": 8,
      **part_fields("backbone", ResNet, self.backbone),
      "dtype": self.dtype,
    }
    features = ResNet(**backbone, name="backbone")(images, train=train)
    pyramid = UnscathedPyramid(
      self.width, self.kernel_sizes, self.norm, self.dtype, name="pyramid"
    )(features["c5"], train=train)
    if self.neck == "fpt":
      pyramid = self._transformer()(pyramid, train=train)
    for level, x in enumerate(pyramid):
      self.sow("intermediates", f"level_{level}", x)
    joined = jnp.concatenate([nn.relu(x) for x in pyramid], axis=-1)
    outputs = {"logits": self._classify("head", joined, self.width, train=train)}
    if self.auxiliary_head and (train or self.is_initializing()):
      c4 = features["c4"]
      auxiliary = self._classify("auxiliary_head", c4, max(1, c4.shape[-1] // 4), train=train)
      outputs["auxiliary_logits"] = auxiliary
    return outputs

  @property
  def level_names(self) -> tuple[str, ...]:
    """Names of the pyramid's levels: the sides of their kernels."""
    return tuple(f"kernel {size}" for size in self.kernel_sizes)

  def _transformer(self) -> FeaturePyramidTransformer:
    fields: dict[str, Any] = {
      "norm": self.norm,
      "window": self.window,
      **part_fields("transformer", FeaturePyramidTransformer, self.transformer),
      "width": self.width,
      "lateral": False,
      "dtype": self.dtype,
    }
    return FeaturePyramidTransformer(**fields, name="transformer")

  def _classify(
    self, name: str, x: Float[Array, "b h w c"], width: int, *, train: bool
  ) -> Float[Array, "b h w k"]:
    norm = norm_factory(self.norm, dtype=self.dtype)
    x = ConvNorm(width, 3, norm, dtype=self.dtype, name=f"{name}_conv")(x, train=train)
    x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    classifier = nn.Dense(
      self.num_classes, kernel_init=nn.initializers.normal(0.01), dtype=wide, name=name
    )
    return classifier(x)
