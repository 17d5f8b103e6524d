"""FPT: a feature pyramid in, one of the same sizes out, in which all levels have seen each other.

Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451. The authors' code
(ZHANGDONG-NJUST/FPT at c7c76f9) computes something else than the paper says, and does not run as it
stands; no trained weights of it were ever published. `flavor` chooses between the two:

| topic                 | "paper"                              | "official"                        |
|-----------------------|--------------------------------------|-----------------------------------|
| self: similarity      | q k of each part, unscaled           | q k / sqrt(d), d of all parts     |
| self: projections     | of their own, without bias           | queries and keys share one; bias  |
| self: keys and values | at every position                    | averaged over 3x3, stride 2       |
| self: shares of parts | from the mean key                    | from the mean query               |
| self: afterwards      | nothing                              | 1x1, batch norm, plus the input   |
| self: dropout         | none                                 | 0.1 of the attention map          |
| grounding: similarity | -(distance)^2, softmax               | q k / positions, no softmax       |
| grounding: mixture    | four parts                           | none                              |
| grounding: width      | that of the pyramid                  | half of it                        |
| grounding: afterwards | nothing                              | 1x1, batch norm that begins at 0  |
| grounding in a window | for segmentation: `window`           | another thing, which nothing uses |
| rendering: gate       | mean key                             | 1x1 of the mean, norm, ReLU       |
| rendering: gate acts  | before the 3x3 convolution           | behind it and a batch norm        |
| rendering: fine map   | one convolution strided by the ratio | strided by 2, as often as needed; |
|                       |                                      | before November 2020: left out    |
| rendering: afterwards | nothing                              | batch norms, sum, ReLU            |
| unused parameters     | none                                 | two kernels of each rendering     |
| DropBlock             | on each output while training        | made, never applied               |
| joining               | concatenation, 3x3 convolution to `width` channels, in both           |

What the paper leaves open: whether the levels' own projections (`query`, `key`, `value`) have a
bias (none here), and which norms stand between (`norm`, on the lateral and joining convolutions).
How far the authors' experiments are those of the paper or of the code is not known.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.nn.init import kaiming_uniform
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.fpt.interactions import (
  GroundingTransformer,
  RenderingTransformer,
  SelfTransformer,
)
from vit_jax_zoo.systems.fpt.mixture_attention import BLOCK_ELEMENTS
from vit_jax_zoo.systems.fpt.official import (
  OfficialGroundingTransformer,
  OfficialRenderingTransformer,
  OfficialSelfTransformer,
)

FLAVORS = ("paper", "official")


class FeaturePyramidTransformer(nn.Module):
  """Transforms a feature pyramid into another one of the same sizes (figure 2).

  Levels are numbered from the finest, 0, which is how their parameters are named: `lateral_0`,
  `self_0`, `ground_0_1` (level 0 looks at level 1), `render_1_0` (level 1 takes up level 0),
  `join_0`.

  Attributes:
    width: channels of all levels inside, and of the result.
    flavor: "paper" or "official"; see the module's docstring.
    norm: behind the lateral and the joining convolutions: "none" (then they have a bias) or a name
      that `norm_factory` knows. Group norms have 32 groups. What is inside of "official" always has
      batch norms.
    rendering: of the official flavour, "head" or "november_2020".
    self_parts: of the self-transformers' mixtures of softmaxes.
    ground_parts: of the grounding transformers', in the paper's flavour.
    window: in the paper's flavour, side of the window of coarse positions that a fine one looks at:
      the locality-constrained grounding transformer; None: all of them.
    lateral: whether a 1x1 convolution first brings each level to `width` channels; without, the
      levels must have them.
    drop_block_rate: of the results, while training.
    drop_block_size: side of the squares.
    dropout_rate: of the official self-transformers' attention maps.
    block_elements: see `ops.mixture_attention.attend`.
    dtype: of the computation. Parameters, softmaxes and norms' statistics are float32.
  """

  width: int = 256
  flavor: str = "paper"
  norm: str = "none"
  rendering: str = "head"
  self_parts: int = 2
  ground_parts: int = 4
  window: int | None = None
  lateral: bool = True
  drop_block_rate: float = 0.0
  drop_block_size: int = 3
  dropout_rate: float = 0.1
  block_elements: int = BLOCK_ELEMENTS
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, pyramid: Sequence[Float[Array, "b _ _ _"]], *, train: bool = False
  ) -> tuple[Float[Array, "b _ _ d"], ...]:
    """Returns one map of `width` channels for each level, of its size.

    Args:
      pyramid: from fine to coarse. Sides of neighbours are equal, or one is a power of two times
        the other, rounded up, as strided convolutions make them.
      train: norms take this batch's statistics (and renew "batch_stats", which must then be
        mutable); dropout and DropBlock draw from the "dropout" stream.

    Raises:
      ValueError: an unknown flavour, or levels that do not fit together.
    """
    self._check(pyramid)
    levels = [self._lateral(level, x, train=train) for level, x in enumerate(pyramid)]
    results = []
    for level, x in enumerate(levels):
      seen = [self._self(level, x, train=train)]
      seen += [
        self._render(level, finer, x, levels[finer], train=train)
        for finer in reversed(range(level))
      ]
      seen += [
        self._ground(level, coarser, x, levels[coarser], train=train)
        for coarser in range(level + 1, len(levels))
      ]
      joined = jnp.concatenate([*seen, x], axis=-1)
      result = self._conv_norm(f"join_{level}", shard_batch(joined), 3, train=train)
      drop = DropBlock(self.drop_block_rate, self.drop_block_size, name=f"drop_block_{level}")
      results.append(drop(result, train=train))
    return tuple(results)

  def _lateral(self, level: int, x: Float[Array, "b h w c"], *, train: bool) -> Array:
    x = shard_batch(x.astype(self.dtype))
    return self._conv_norm(f"lateral_{level}", x, 1, train=train) if self.lateral else x

  def _conv_norm(
    self, name: str, x: Float[Array, "b h w c"], size: int, *, train: bool
  ) -> Float[Array, "b h w d"]:
    x = nn.Conv(
      self.width,
      (size, size),
      padding=((size // 2, size // 2),) * 2,
      use_bias=self.norm == "none",
      kernel_init=kaiming_uniform,
      dtype=self.dtype,
      name=name,
    )(x)
    if self.norm != "none":
      x = norm_factory(self.norm, dtype=self.dtype)(name=f"{name}_norm")(x, train=train)
    self.sow("intermediates", f"{name}_output", x)
    return x

  def _self(self, level: int, x: Float[Array, "b h w d"], *, train: bool) -> Array:
    name = f"self_{level}"
    fields = {"block_elements": self.block_elements, "dtype": self.dtype, "name": name}
    if self.flavor == "paper":
      result = SelfTransformer(self.width, self.self_parts, **fields)(x)
    else:
      transformer = OfficialSelfTransformer(
        self.width, self.self_parts, dropout_rate=self.dropout_rate, **fields
      )
      result = transformer(x, train=train)
    self.sow("intermediates", f"{name}_output", result)
    return shard_batch(result)

  def _ground(
    self, level: int, other: int, x: Float[Array, "b h w d"], coarse: Array, *, train: bool
  ) -> Float[Array, "b h w d"]:
    name = f"ground_{level}_{other}"
    fields = {"block_elements": self.block_elements, "dtype": self.dtype, "name": name}
    if self.flavor == "paper":
      transformer = GroundingTransformer(
        self.width, self.ground_parts, window=self.window, **fields
      )
      result = transformer(x, coarse)
    else:
      result = OfficialGroundingTransformer(self.width, **fields)(x, coarse, train=train)
    self.sow("intermediates", f"{name}_output", result)
    return shard_batch(result)

  def _render(
    self, level: int, other: int, x: Float[Array, "b h w d"], fine: Array, *, train: bool
  ) -> Float[Array, "b h w d"]:
    name = f"render_{level}_{other}"
    if self.flavor == "paper":
      result = RenderingTransformer(self.width, dtype=self.dtype, name=name)(x, fine)
    else:
      transformer = OfficialRenderingTransformer(
        self.width, self.rendering, dtype=self.dtype, name=name
      )
      result = transformer(x, fine, train=train)
    self.sow("intermediates", f"{name}_output", result)
    return shard_batch(result)

  def _check(self, pyramid: Sequence[Float[Array, "b _ _ _"]]) -> None:
    if self.flavor not in FLAVORS:
      raise ValueError(unknown_name("flavor", self.flavor, FLAVORS))
    if self.window is not None and self.flavor != "paper":
      raise ValueError("the official flavour has no grounding in a window; leave window out")
    if not pyramid:
      raise ValueError("a pyramid of no levels was given; give at least one")
    for level, x in enumerate(pyramid):
      if not self.lateral and x.shape[-1] != self.width:
        raise ValueError(
          f"level {level} has {x.shape[-1]} channels; without lateral convolutions it needs the "
          f"width, {self.width}"
        )
