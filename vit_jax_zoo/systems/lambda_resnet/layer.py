"""Lambda layer. Bello, "LambdaNetworks", ICLR 2021, arXiv:2102.08602, section 3.

Axes: `b` images, `h w` query positions, `y x` context positions (the same map), `i` heads, `k`
depth of queries and keys, `v` depth of values per head, `u` intra-depth. Keys and values have no
head axis: all heads share one lambda (the paper's multi-query lambdas).
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from vit_jax_zoo.nn.norm import BatchNorm
from vit_jax_zoo.nn.resnet import average_pool
from vit_jax_zoo.ops.checks import check_positive

Chosen: TypeAlias = Literal["einsum", "convolution"]
Implementation: TypeAlias = Literal["auto", Chosen]
Size: TypeAlias = tuple[int, ...]  # height and width of a map
Values: TypeAlias = Float[Array, "b h w u v"]
Embeddings: TypeAlias = Float[Array, "dy dx u k"]
PositionLambda: TypeAlias = Float[Array, "b h w k v"]

# Measured speed of a dense matrix product per multiply-add, relative to a convolution with `u`
# input channels (16x16 and 32x32 maps, 9x9 scope, forward and backward).
EINSUM_ADVANTAGE = 6.0
# The paper uses the einsum up to 85^2 positions (k = 16, u = 1); its table of embeddings of all
# pairs grows with the square of the positions.
EINSUM_MAX_ELEMENTS = 85**4 * 16


class LambdaOutput(NamedTuple):
  """Output of `apply_lambdas`; lambdas are float32, position lambdas include the bias."""

  output: Float[Array, "b h w i v"]
  content_lambda: Float[Array, "b k v"]
  position_lambda: PositionLambda


def apply_lambdas(
  queries: Float[Array, "b h w i k"],
  keys: Float[Array, "b h w u k"],
  values: Values,
  embeddings: Embeddings,
  *,
  bias: Float[Array, " k"] | None = None,
  implementation: Implementation = "auto",
) -> LambdaOutput:
  """Applies content and position lambdas to the queries of a map (arXiv:2102.08602, Eq. 1-2).

  Queries are unscaled (the paper has `1/sqrt(k)` in the initialization), keys before the softmax.
  `embeddings` are relative (context minus query), zero beyond their odd sides: `[2h-1 2w-1]`
  reaches every position, `[r r]` is the lambda convolution's local scope. `bias` is added to the
  position lambdas (in timm and lucidrains' code, not in the paper).
  """
  map_size = values.shape[1:3]
  embeddings = _crop(embeddings, map_size).astype(values.dtype)
  if implementation == "auto":
    implementation = choose_implementation(map_size, embeddings.shape)
  wide = jnp.promote_types(values.dtype, jnp.float32)  # lambdas are sums over the whole map
  weights = jax.nn.softmax(keys.astype(wide), axis=(1, 2)).astype(values.dtype)
  einsum = functools.partial(jnp.einsum, preferred_element_type=wide)

  content = einsum("byxuk,byxuv->bkv", weights, values)
  if implementation == "einsum":
    position = einsum("hywxuk,byxuv->bhwkv", relative_embeddings(embeddings, map_size), values)
  else:
    position = _position_lambdas_by_convolution(values, embeddings)
  if bias is not None:
    position += bias.astype(wide).reshape(1, 1, 1, -1, 1)

  output = jnp.einsum("bhwik,bkv->bhwiv", queries, content.astype(queries.dtype)).astype(wide)
  output += jnp.einsum("bhwik,bhwkv->bhwiv", queries.astype(wide), position)
  return LambdaOutput(output.astype(queries.dtype), content, position)


def choose_implementation(map_size: Size, embeddings_shape: tuple[int, ...]) -> Chosen:
  """Returns the cheaper implementation of position lambdas for these shapes.

  Per query and channel, the einsum has one multiply-add per map position, the convolution one per
  scope position, which is slower. The einsum also needs the embeddings of all pairs in memory.
  """
  positions = math.prod(map_size)
  scope = math.prod(min(s, 2 * n - 1) for s, n in zip(embeddings_shape, map_size, strict=False))
  too_large = positions**2 * math.prod(embeddings_shape[2:]) > EINSUM_MAX_ELEMENTS
  return "convolution" if too_large or positions > EINSUM_ADVANTAGE * scope else "einsum"


def relative_embeddings(embeddings: Embeddings, map_size: Size) -> Float[Array, "h y w x u k"]:
  """Returns the embeddings of all pairs of positions, zero for offsets beyond `embeddings`."""
  sides = zip(map_size, embeddings.shape, strict=False)
  padding = [((2 * side - 1 - length) // 2,) * 2 for side, length in sides]
  padding += [(0, 0), (0, 0)]
  return jax.vmap(jax.vmap(_toeplitz))(_toeplitz(jnp.pad(embeddings, padding)))


def _toeplitz(offsets: Float[Array, "d ..."]) -> Float[Array, "n n ..."]:
  """Arranges an array by offset by query and context; a gather's gradient would be a scatter.

  Reads copies of the array with a row length that is one shorter, so that rows shift by one.
  """
  size = (offsets.shape[0] + 1) // 2
  padded = jnp.concatenate([offsets, jnp.zeros_like(offsets[:1])])
  repeated = jnp.tile(padded, (size,) + (1,) * (offsets.ndim - 1))
  sliding = repeated[size - 1 : size - 1 + size * (2 * size - 1)]
  return sliding.reshape(size, 2 * size - 1, *offsets.shape[1:])[:, :size]


def _position_lambdas_by_convolution(values: Values, embeddings: Embeddings) -> PositionLambda:
  """Convolves every value channel separately, as examples of a batch."""
  wide = jnp.promote_types(values.dtype, jnp.float32)
  maps = einops.rearrange(values, "b h w u v -> (b v) h w u").astype(wide)
  padding = [(side // 2, side // 2) for side in embeddings.shape[:2]]
  kernel, layout = embeddings.astype(wide), ("NHWC", "HWIO", "NHWC")
  lambdas = jax.lax.conv_general_dilated(maps, kernel, (1, 1), padding, dimension_numbers=layout)
  return einops.rearrange(lambdas, "(b v) h w k -> b h w k v", v=values.shape[-1])


def _crop(embeddings: Embeddings, map_size: Size) -> Float[Array, "ey ex u k"]:
  for axis, side in enumerate(map_size):
    length, limit = embeddings.shape[axis], 2 * side - 1
    if length % 2 == 0:
      sides = embeddings.shape[:2]
      raise ValueError(f"position_embedding: sides {sides}; expected odd ones, around offset 0")
    start = max(length - limit, 0) // 2
    embeddings = jax.lax.slice_in_dim(embeddings, start, length - start, axis=axis)
  return embeddings


class LambdaLayer(nn.Module):
  """Lambda layer with as many output as input channels; replaces a 3x3 convolution.

  The columns of the projection `qkv` are queries (i k), keys (u k), values (u v). A global table
  belongs to the map size at initialization; on other maps, the offsets beyond it are zero. Initial
  standard deviations are the paper's: (k d)^-0.5 of queries, d^-0.5 of keys and values, 1 of the
  embeddings.
  """

  num_heads: int = 4  # query heads, divides the channels (paper's h; read from timm's weights)
  dim_k: int = 16  # depth of queries and keys (paper's k, ablation from 2 to 32; timm's dim_head)
  dim_u: int = 1  # intra-depth (paper, ablation of u)
  receptive_field: int | None = 23  # odd scope, None: all (paper's ablation; timm's 26t, 26rpt_256)
  position_bias: bool = False  # of each query channel in position lambdas (timm, lucidrains)
  stride: int = 1  # 2: average pooling after the lambdas (first block of c5; paper and timm)
  pool_size: int = 3  # pooling window: 3 (paper; padded by one, padding not counted) or 2 (timm)
  implementation: Implementation = "auto"  # see `apply_lambdas`
  norm: Callable[..., nn.Module] | None = None  # creates a norm by `name`; None: batch
  dtype: Dtype = "float32"  # of projections and output. Softmax and lambdas are float32.

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b h2 w2 d"]:
    self._check(x)
    grid, dim_v = x.shape[:3], x.shape[-1] // self.num_heads
    sizes = (self.num_heads * self.dim_k, self.dim_u * self.dim_k, self.dim_u * dim_v)
    std = x.shape[-1] ** -0.5
    init = _qkv_init(sizes, (std * self.dim_k**-0.5, std, std))
    fields = {"use_bias": False, "kernel_init": init, "dtype": self.dtype}
    projected = nn.Dense(sum(sizes), **fields, name="qkv")(x)
    queries, keys, values = jnp.split(projected, (sizes[0], sizes[0] + sizes[1]), axis=-1)
    norm = self.norm or functools.partial(BatchNorm, dtype=self.dtype)
    queries = norm(name="query_norm")(queries, train=train)
    values = norm(name="value_norm")(values, train=train)
    zeros, bias = nn.initializers.zeros, None
    if self.position_bias:
      bias = self.param("position_bias", zeros, (self.dim_k,), jnp.float32)
    queries = queries.reshape(*grid, self.num_heads, self.dim_k)
    keys = keys.reshape(*grid, self.dim_u, self.dim_k)
    values, embeddings = values.reshape(*grid, self.dim_u, dim_v), self._embeddings(grid[1:])
    options = {"bias": bias, "implementation": self.implementation}
    result = apply_lambdas(queries, keys, values, embeddings, **options)
    self.sow("intermediates", "content_lambda", result.content_lambda)
    self.sow("intermediates", "position_lambda", result.position_lambda)
    y = result.output.reshape(x.shape)
    if self.stride > 1:
      y = average_pool(y, self.pool_size, self.stride, padding=self.pool_size % 2)
    self.sow("intermediates", "output", y.astype(self.dtype))
    return y.astype(self.dtype)

  def _embeddings(self, map_size: Size) -> Embeddings:
    name = "position_embedding"
    if self.has_variable("params", name):  # of any map size
      return self.get_variable("params", name)
    scope = self.receptive_field
    sides = [2 * side - 1 for side in map_size] if scope is None else [scope, scope]
    shape = (*sides, self.dim_u, self.dim_k)
    return self.param(name, nn.initializers.normal(1.0), shape, jnp.float32)

  def _check(self, x: Float[Array, "b h w d"]) -> None:
    check_positive(self, "dim_k", "dim_u", "num_heads", "receptive_field")
    if x.shape[-1] % self.num_heads:
      raise ValueError(f"num_heads: {self.num_heads} does not divide {x.shape[-1]} channels")
    if self.receptive_field is not None and self.receptive_field % 2 == 0:
      raise ValueError(f"receptive_field: {self.receptive_field} is even; expected an odd number")
    if self.stride not in (1, 2) or self.pool_size not in (2, 3):
      pool = f"pool_size {self.pool_size}"
      raise ValueError(f"stride: {self.stride} with {pool}; expected 1 or 2 with pool_size 2 or 3")
    if self.stride == 2 and self.pool_size == 2 and (x.shape[1] % 2 or x.shape[2] % 2):
      wrong = f"a map of {x.shape[1]}x{x.shape[2]} cannot be halved by 2x2 pooling"
      raise ValueError(f"{wrong}; resize the images to multiples of 32")


def _qkv_init(sizes: tuple[int, ...], stds: tuple[float, ...]) -> Initializer:
  def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    scales = jnp.repeat(jnp.asarray(stds, dtype), jnp.asarray(sizes), total_repeat_length=shape[-1])
    return jax.random.normal(key, shape, dtype) * scales[None]

  return init
