"""FPT for semantic segmentation, arXiv:2007.09451: dilated ResNet, pyramid, FPT, pixel classifier.

No code of these networks was released. Not stated in the paper, and chosen as usual: a 3x3
convolution joins the levels before the classifier; an optional auxiliary classifier on c4
(arXiv:1612.01105, section 3.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names, part_fields
from vit_jax_zoo.nn.init import kaiming_normal
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, ConvNorm, ResNet
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer


class GlobalConvolution(nn.Module):
  """A large kernel as the sum of two separable ones, column-row and row-column."""

  features: int
  kernel_size: int  # side of the kernel, odd; 1 is a 1x1 convolution
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise ValueError(f"kernel_sizes: {self.kernel_size}; expected odd numbers")
    if self.kernel_size == 1:
      return self._conv((1, 1), "conv")(x)
    column, row = (self.kernel_size, 1), (1, self.kernel_size)
    one = self._conv(row, "column_row")(self._conv(column, "column")(x))
    return one + self._conv(column, "row_column")(self._conv(row, "row")(x))

  def _conv(self, size: tuple[int, int], name: str) -> nn.Module:
    padding = tuple((side // 2, side // 2) for side in size)
    fields = {"padding": padding, "kernel_init": kaiming_normal, "dtype": self.dtype, "name": name}
    return nn.Conv(self.features, size, **fields)


class UnscathedPyramid(nn.Module):
  """Unscathed feature pyramid: maps of one size, smallest receptive field first."""

  width: int = 256  # channels of each level
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)  # from the finest to the coarsest level
  norm: str = "batch_norm"  # after the convolutions, a name of `norm_factory`
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> tuple[Float[Array, "b h w d"], ...]:
    make_norm = norm_factory(self.norm, dtype=self.dtype)
    levels = []
    for index, size in enumerate(self.kernel_sizes):
      level = GlobalConvolution(self.width, size, self.dtype, name=f"branch_{index}")(x)
      level = make_norm(name=f"norm_{index}")(level, train=train)
      levels.append(shard_batch(jnp.maximum(level, 0)))
    return tuple(levels)


VARIANTS: dict[str, dict[str, Any]] = {
  f"fpt_segmentation_r{depth}{suffix}": {"backbone": {"blocks": RESNET_BLOCKS[depth]}, **neck}
  for suffix, neck in (("", {}), ("_ufp", {"neck": "ufp"}))
  for depth in (50, 101)
} | {
  "fpt_pyramid": {},
  "fpt_pyramid_official": {"variant": "official"},
  "fpt_pyramid_official_gn": {"variant": "official", "norm": "group_norm"},
}
"""Fields by model name: of `PyramidSegmenter` ("ufp": without transformer), and of
`FeaturePyramidTransformer`, whose input is a pyramid instead of images."""

SHARDING_RULES = ((r".*/(bias|scale|mixture)", ()), (r".*", "fsdp"))
"""Kernels are sharded over `fsdp`, small arrays replicated."""

NECKS = ("fpt", "ufp")


class PyramidSegmenter(nn.Module):
  """Classifies every pixel."""

  num_classes: int = 19
  width: int = 256  # channels of the pyramid's levels
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)  # of `UnscathedPyramid` (the paper's UFP)
  neck: str = "fpt"  # "fpt", or "ufp": the pyramid without transformer, the paper's baseline
  window: int | None = 5  # of grounding, not stated in the paper; None: all positions
  transformer: Mapping[str, Any] | None = None  # further fields of `FeaturePyramidTransformer`
  norm: str = "batch_norm"  # norm of everything after the backbone; see `norm_factory`
  dropout_rate: float = 0.1  # before the classifiers (torchvision's FCNHead)
  auxiliary_head: bool = False  # on c4 in training (arXiv:1612.01105, section 3.2; the recipes)
  backbone: Mapping[str, Any] | None = None  # fields of `ResNet`; default "output_stride": 8
  dtype: Dtype = "float32"  # of the computation; parameters, statistics, logits are float32

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> dict[str, Float[Array, "b i j k"]]:
    """Segments images, normalized with ImageNet's mean and standard deviation.

    Returns `logits` float32 [b i j num_classes], of the size of the backbone's last map; in
    training with an auxiliary head also `auxiliary_logits`. In training norms use batch statistics
    (and update "batch_stats", which must be mutable), and dropout the "dropout" stream.
    """
    check_names("neck", [self.neck], NECKS)
    check_positive(self, "num_classes", "width", "kernel_sizes")
    check_rates(self, "dropout_rate")
    fields: dict[str, Any] = {"output_stride": 8, **part_fields("backbone", ResNet, self.backbone)}
    fields["dtype"] = self.dtype
    features = ResNet(**fields, name="backbone")(images, train=train)
    sizes, kinds = (self.width, self.kernel_sizes), (self.norm, self.dtype)
    pyramid = UnscathedPyramid(*sizes, *kinds, name="pyramid")(features["c5"], train=train)
    if self.neck == "fpt":
      fields = {"norm": self.norm, "window": self.window}
      fields |= part_fields("transformer", FeaturePyramidTransformer, self.transformer)
      fields |= {"width": self.width, "lateral": False, "dtype": self.dtype}
      pyramid = FeaturePyramidTransformer(**fields, name="transformer")(pyramid, train=train)
    for level, x in enumerate(pyramid):
      self.sow("intermediates", f"level_{level}", x)
    joined = jnp.concatenate([nn.relu(x) for x in pyramid], axis=-1)
    outputs = {"logits": self._classify("head", joined, self.width, train=train)}
    if self.auxiliary_head and (train or self.is_initializing()):
      c4, width = features["c4"], max(1, features["c4"].shape[-1] // 4)
      outputs["auxiliary_logits"] = self._classify("auxiliary_head", c4, width, train=train)
    return outputs

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f"kernel {size}" for size in self.kernel_sizes)

  def _classify(
    self, name: str, x: Float[Array, "b h w c"], width: int, *, train: bool
  ) -> Float[Array, "b h w k"]:
    norm = norm_factory(self.norm, dtype=self.dtype)
    x = ConvNorm(width, 3, norm, dtype=self.dtype, name=f"{name}_conv")(x, train=train)
    x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
    wide, init = jnp.promote_types(x.dtype, jnp.float32), nn.initializers.normal(0.01)
    return nn.Dense(self.num_classes, kernel_init=init, dtype=wide, name=name)(x)
