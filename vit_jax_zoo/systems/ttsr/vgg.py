"""VGG-19 as a feature extractor. Simonyan and Zisserman, arXiv:1409.1556, Table 1, column E."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.nn.conv import Conv

DEPTHS = (2, 2, 4, 4, 4)
"""Convolutions in each stage; a max-pool stands between stages."""

WIDTHS = (64, 128, 256, 512, 512)


class VGG19(nn.Module):
  """Returns named features of pictures, and ends where the last of them is reached.

  Attributes:
    outputs: "relu<stage>_<convolution>", both counted from 1.
    widths: output channels of each stage that is reached.
    dtype: of the computation.
  """

  outputs: tuple[str, ...] = ("relu5_1",)
  widths: Sequence[int] = WIDTHS
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w 3"], *, precise: bool = False
  ) -> dict[str, Float[Array, "b ..."]]:
    """Returns features by the names of `outputs`.

    Args:
      images: in [-1, 1]; they are brought to ImageNet's mean and deviation here.
      precise: computes in float32 at the highest precision, whatever `dtype` says.
    """
    dtype = jnp.promote_types(images.dtype, jnp.float32) if precise else self.dtype
    precision = "highest" if precise else None
    mean, std = (jnp.asarray(x, dtype).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((images.astype(dtype) + 1) / 2 - mean) / std
    wanted = {_position(name) for name in self.outputs}
    found = {}
    for stage, number in _layers(max(wanted)):
      if stage > 1 and number == 1:
        x = nn.max_pool(x, (2, 2), (2, 2))
      conv = Conv(
        self.widths[stage - 1], dtype=dtype, precision=precision, name=f"conv{stage}_{number}"
      )
      x = nn.relu(conv(x))
      if (stage, number) in wanted:
        found[f"relu{stage}_{number}"] = x
    return found


def _layers(last: tuple[int, int]) -> list[tuple[int, int]]:
  """Stage and number of each convolution up to the last."""
  every = [(i, j) for i, depth in enumerate(DEPTHS, 1) for j in range(1, depth + 1)]
  return every[: every.index(last) + 1]


def _position(name: str) -> tuple[int, int]:
  match = re.fullmatch(r"relu([1-5])_([1-4])", name)
  if match is None or int(match[2]) > DEPTHS[int(match[1]) - 1]:
    raise ValueError(f"VGG-19 has no output {name!r}; there are relu1_1, relu1_2, ... relu5_4")
  return int(match[1]), int(match[2])
