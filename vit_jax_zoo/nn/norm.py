"""Batch norm with PyTorch's statistics, frozen batch norm, group norm."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.nn.init import kaiming_uniform


class BatchNorm(nn.Module):
  """Batch norm over batch and positions. Ioffe & Szegedy, arXiv:1502.03167.

  As in PyTorch, activations are normalized with the biased variance, and the running average is of
  the unbiased one (Flax averages the biased one). The running averages are `mean` and `var` in
  "batch_stats". Inside `jax.jit` statistics are synchronized over devices.
  """

  momentum: float = 0.9  # weight of the old running average; 1 - PyTorch's momentum
  epsilon: float = 1e-5  # added to the variance
  scale_init: Initializer = nn.initializers.ones
  dtype: Dtype = "float32"  # of the output; statistics are at least float32

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"], *, train: bool) -> Float[Array, "*b c"]:
    """Returns `x` normalized with batch statistics if `train`, else with running averages."""
    channels = x.shape[-1:]
    scale = self.param("scale", self.scale_init, channels, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = running_mean.value, running_var.value
    if train:
      # Moments around the running mean: one pass, without the cancellation of E[x^2] - E[x]^2.
      origin, axes = jax.lax.stop_gradient(mean), tuple(range(x.ndim - 1))
      offset = x - _as_channels(origin, x)
      mean = jnp.mean(offset, axes)
      var = jnp.maximum(jnp.mean(offset * offset, axes) - mean * mean, 0)
      mean = mean + origin
      if not self.is_initializing():
        count = x.size // x.shape[-1]
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
          running.value = self.momentum * running.value + (1 - self.momentum) * new
    return _normalize(x, mean, var, scale, bias, self.epsilon).astype(self.dtype)


class FrozenBatchNorm(nn.Module):
  """Batch norm with fixed scale, bias, mean and variance, all in "batch_stats": no parameters."""

  epsilon: float = 1e-5
  scale_init: Initializer | None = None  # no effect; for the signature of `BatchNorm`
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"], *, train: bool = False) -> Float[Array, "*b c"]:
    """Returns `x` normalized with the stored statistics, in training, too."""
    del train
    initial = {"mean": jnp.zeros, "var": jnp.ones, "scale": jnp.ones, "bias": jnp.zeros}
    frozen = {
      k: self.variable("batch_stats", k, v, x.shape[-1:], jnp.float32).value
      for k, v in initial.items()
    }
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _normalize(x, **frozen, epsilon=self.epsilon).astype(self.dtype)


class GroupNorm(nn.GroupNorm):
  """Linen's group norm (32 groups) with the call signature of the batch norms."""

  # E[x^2] - E[x]^2 cancels where a group is two nearly equal numbers.
  use_fast_variance: bool = False

  def __call__(self, x: Float[Array, "b *n c"], *, train: bool = False) -> Float[Array, "b *n c"]:
    """Returns `x` normalized per example and group of channels."""
    del train
    return super().__call__(x)


NORMS = {"batch_norm": BatchNorm, "frozen_batch_norm": FrozenBatchNorm, "group_norm": GroupNorm}


def norm_factory(
  kind: str, *, momentum: float = 0.9, epsilon: float = 1e-5, dtype: Dtype = "float32"
) -> Callable[..., nn.Module]:
  """Returns a function that creates a norm of a kind in `NORMS` from `name` and `scale_init`."""
  check_names("norm", [kind], NORMS)
  averages = {"momentum": momentum} if kind == "batch_norm" else {}
  return functools.partial(NORMS[kind], epsilon=epsilon, dtype=dtype, **averages)


def conv_norm(
  owner: Any,
  name: str,
  x: Float[Array, "b h w c"],
  features: int,
  size: int,
  *,
  train: bool,
  kernel_init: Initializer = kaiming_uniform,
) -> Float[Array, "b h w f"]:
  """Applies a size x size convolution and its norm, `<name>_norm`, as submodules of `owner`.

  `owner` has `dtype` and `norm`, a key of `NORMS`, or "none": the convolution then has a bias.
  """
  options = {"use_bias": owner.norm == "none", "kernel_init": kernel_init, "dtype": owner.dtype}
  x = nn.Conv(features, (size, size), **options, name=name)(x)
  return optional_norm(owner, name, x, train=train)


def optional_norm(owner: Any, name: str, x: Float[Array, "b *n c"], *, train: bool) -> Array:
  """Applies the norm `<name>_norm` of `conv_norm`."""
  if owner.norm == "none":
    return x
  return norm_factory(owner.norm, dtype=owner.dtype)(name=f"{name}_norm")(x, train=train)


def _normalize(
  x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float
) -> Float[Array, "*b c"]:
  factor = scale * jax.lax.rsqrt(var + epsilon)
  return (x - _as_channels(mean, x)) * _as_channels(factor, x) + _as_channels(bias, x)


def _as_channels(values: Float[Array, " c"], x: Float[Array, "*b c"]) -> Float[Array, "*ones c"]:
  return values.reshape((1,) * (x.ndim - 1) + values.shape)
