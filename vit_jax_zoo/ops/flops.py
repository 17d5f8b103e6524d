"""FLOPs of a JAX function from its jaxpr: XLA's cost analysis counts the body of a loop once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
  """Returns the floating-point operations of the function's matrix products and convolutions.

  A multiply-add counts as two. Elementwise operations, reductions, sorting and products with
  padding or the zeros of a dilated input do not count, so that each gradient of a convolution costs
  as much as the convolution. Recomputation counts each time, a Pallas kernel for its whole grid, a
  conditional as its most expensive branch. Arguments are arrays or `jax.ShapeDtypeStruct`s.
  ValueError for matrix products in a while loop.
  """
  return _jaxpr_flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> int:
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    sides = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * math.prod((*equation.outvars[0].aval.shape, *sides))
  if name == "conv_general_dilated":
    return _convolution_flops(equation)
  inner = [_jaxpr_flops(jaxpr) for jaxpr in jaxprs_in_params(params)]
  match name:
    case "cond":
      return max(inner)
    case "scan":
      return params["length"] * sum(inner)
    case "pallas_call":
      return math.prod(params["grid_mapping"].grid) * sum(inner)
    case "shard_map":  # its shapes are those of one device
      return params["mesh"].size * sum(inner)
    case "while" if sum(inner):
      raise ValueError("while loop: FLOPs unknown; expected jax.lax.scan or fori_loop")
  return sum(inner)


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
