"""FLOPs of a JAX function, counted from its jaxpr.

XLA's cost analysis counts the body of a loop once; here a scan counts its length.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
  """Returns the floating-point operations of the function's matrix products and convolutions.

  A multiply-add counts as two. Elementwise operations, reductions, sorting and products with
  padding or the zeros of a dilated input do not count, so that each gradient of a convolution costs
  as much as the convolution. Recomputation counts each time, a Pallas kernel for its whole grid, a
  conditional as its most expensive branch. Arguments are arrays or `jax.ShapeDtypeStruct`s.
  ValueError for matrix products in a while loop.
  """
  return jaxpr_flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def jaxpr_flops(jaxpr: Any) -> int:
  """Returns the FLOPs of a jaxpr; see `count_flops`."""
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
  name = equation.primitive.name
  if name == "dot_general":
    return _dot_flops(equation)
  if name == "conv_general_dilated":
    return _convolution_flops(equation)
  inner = [jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(equation.params)]
  if name == "cond":
    return max(inner)
  if name == "while" and sum(inner):
    raise ValueError("while loop: FLOPs unknown; expected jax.lax.scan or fori_loop")
  times = {
    "scan": lambda params: params["length"],
    "pallas_call": lambda params: math.prod(params["grid_mapping"].grid),
    "shard_map": lambda params: params["mesh"].size,  # its shapes are those of one device
  }
  return sum(inner) * (times[name](equation.params) if name in times else 1)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      jaxpr = getattr(item, "jaxpr", item)  # a ClosedJaxpr wraps one
      if hasattr(jaxpr, "eqns"):
        yield jaxpr


def _dot_flops(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: Any) -> int:
  params = equation.params
  numbers = params["dimension_numbers"]
  inputs, kernel = (v.aval.shape for v in equation.invars[:2])
  output = equation.outvars[0].aval.shape
  # The kernel's input-feature axis is that of one group, and so is the output's batch axis.
  products = output[numbers.out_spec[0]] * output[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
  for axis, stride in enumerate(params["window_strides"]):
    # The number of (output, kernel) pairs along the axis that read an element of the input.
    dilation = params["lhs_dilation"][axis]
    first = np.arange(output[numbers.out_spec[2 + axis]])[:, None] * stride
    taps = np.arange(kernel[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
    position = first + taps - params["padding"][axis][0]
    inside = (position >= 0) & (position <= (inputs[numbers.lhs_spec[2 + axis]] - 1) * dilation)
    products *= int(np.sum(inside & (position % dilation == 0)))
  return 2 * products
