"""Initializers of PyTorch and of the published detection code."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

kaiming_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
"""PyTorch's `kaiming_uniform_(a=1)`: Detectron's FPN and box head, DETR's mask head, FPT."""

kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""PyTorch's `kaiming_normal_(mode="fan_out")`: ResNets, R-CNN's convolutions."""


@functools.cache
def pytorch_uniform(fan_in: int | None = None) -> nn.initializers.Initializer:
  """Returns PyTorch's default init of dense layers and convolutions: U(-b, b), b = fan_in^-0.5.

  `fan_in`, the inputs of one output unit, is the kernel's own if None; a bias needs it.
  """

  def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Float[Array, "..."]:
    bound = (math.prod(shape[:-1]) if fan_in is None else fan_in) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
