"""Dense layers in the form that XLA runs fastest on CPUs.

Results are those of `jax.lax.dot_general`, except for rounding.
"""

import math
from typing import Any

import jax
from jaxtyping import Array, Float


def matrix_product(
  x: Float[Array, "..."], kernel: Float[Array, "..."], dimension_numbers: Any, **options: Any
) -> Float[Array, "..."]:
  """A `dot_general` for `nn.Dense` and `nn.DenseGeneral` as a product of two matrices.

  XLA on CPUs copies and transposes operands and gradients of products of more dimensions.
  """
  count = len(dimension_numbers[0][0])  # Linen contracts the last axes of x with the kernel's first
  inner = math.prod(kernel.shape[:count])
  out = jax.lax.dot(x.reshape(-1, inner), kernel.reshape(inner, -1), **options)
  return out.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:])
