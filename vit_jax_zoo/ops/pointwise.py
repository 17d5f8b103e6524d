"""1x1 convolutions whose kernels' gradients are matrix products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def pointwise_conv(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "1 1 c f"],
  window_strides: tuple[int, int],
  padding: Any,
  *,
  precision: Any = None,
  **unused: Any,
) -> Float[Array, "b h2 w2 f"]:
  """Convolves; takes what `nn.Conv` gives to `conv_general_dilated` of a 1x1 kernel without groups.

  The result and the gradient of `x` are XLA's. That of the kernel is one product over all
  positions: XLA on a CPU computes it as a convolution with a window as large as the map, which
  takes two to ten times as long.
  """
  del padding, unused  # there is none; dilations of one tap mean nothing
  return _convolve(x, kernel, tuple(window_strides), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any) -> Any:
  return jax.lax.conv_general_dilated(
    x, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
  )


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any) -> Any:
  return _convolve(x, kernel, strides, precision), (x, kernel)


def _backward(strides: tuple[int, int], precision: Any, kept: Any, gradient: jax.Array) -> Any:
  x, kernel = kept
  convolve = functools.partial(_convolve.fun, strides=strides, precision=precision)
  (of_x,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(gradient)
  seen = x[:, :: strides[0], :: strides[1]]
  # XLA on a CPU lays out the left factor anew, slowly; so that is the narrower one.
  if seen.shape[-1] > gradient.shape[-1]:
    of_kernel = jnp.einsum("bhwf,bhwc->fc", gradient, seen, precision=precision).T
  else:
    of_kernel = jnp.einsum("bhwc,bhwf->cf", seen, gradient, precision=precision)
  return of_x, of_kernel[None, None]


_convolve.defvjp(_forward, _backward)
