"""The lambda layer as a module: projections, norms, embeddings. arXiv:2102.08602, section 3."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.nn.norm import BatchNorm
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.systems.lambda_resnet.lambda_op import Implementation, lambda_layer

INITIALIZATIONS = ("paper", "timm")


class LambdaLayer(nn.Module):
  """Exchanges information over a map through lambdas; takes the place of a 3x3 convolution.

  Queries and values are batch-normalised after their projection, keys by a softmax over the
  positions of the context; there is no output projection. The parameters: `qkv` (a 1x1 convolution
  whose outputs are queries (head k), keys (u k) and values (u v), side by side), `query_norm`,
  `value_norm`, `position_embedding` `[dy dx u k]` (context minus query) and, by choice,
  `position_bias` `[k]`.

  A global table belongs to the map on which it was initialised. On other maps the offsets that it
  has keep their embeddings and the others get none.

  Attributes:
    dim_out: output channels, a multiple of `num_heads`; None: as many as come in.
    num_heads: queries at each position, answered by one shared lambda.
    dim_k: length of queries and keys.
    dim_u: intra-depth: keys and values for each position of the context, summed in the lambdas.
    receptive_field: side of the scope of the position lambdas, odd; None: the whole map.
    position_bias: adds one bias for each query channel to the position lambdas, as the public
      codes do (lucidrains' and timm's `conv_lambda`) and the paper does not.
    qkv_bias: whether the projections have a bias.
    stride: 2 halves the map after the lambdas have been applied, by average pooling.
    pool_size: of that pooling: 3 (the paper; padded by one, padding not counted) or 2 (timm).
    initialization: "paper" (queries N(0, 1 / (k d)) in variance, keys and values N(0, 1 / d),
      embeddings N(0, 1)) or "timm" (projections N(0, 1 / d), a scope's embeddings N(0, 1 / k), a
      global table's deviation 0.02).
    implementation: of the position lambdas; see `ops.lambda_op.choose_implementation`.
    norm: makes a norm, called with `name`; None: a batch norm.
    dtype: of projections and output. Softmax and lambdas are float32.
  """

  dim_out: int | None = None
  num_heads: int = 4
  dim_k: int = 16
  dim_u: int = 1
  receptive_field: int | None = 23
  position_bias: bool = False
  qkv_bias: bool = False
  stride: int = 1
  pool_size: int = 3
  initialization: str = "paper"
  implementation: Implementation = "auto"
  norm: Callable[..., nn.Module] | None = None
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool, mask: Bool[Array, "n m"] | None = None
  ) -> Float[Array, "b h2 w2 d"]:
    """Returns the layer's output.

    Args:
      x: the map, queries and context alike.
      train: whether batch norms take the statistics of this batch.
      mask: True where query n may see context m (row by row), the same for every image.

    Raises:
      ValueError: fields that do not fit together, or a map that 2x2 pooling cannot halve.
    """
    dim_out = self.dim_out or x.shape[-1]
    self._check(dim_out, x.shape[1:3])
    queries, keys, values = self._project(x, dim_out // self.num_heads, train=train)
    bias = None
    if self.position_bias:
      bias = self.param("position_bias", nn.initializers.zeros, (self.dim_k,))
    result = lambda_layer(
      queries,
      keys,
      values,
      self._embeddings(x.shape[1:3]),
      bias=bias,
      mask=mask,
      implementation=self.implementation,
    )
    self.sow("intermediates", "content_lambda", result.content_lambda)
    self.sow("intermediates", "position_lambda", result.position_lambda)
    y = self._pool(result.output.reshape(*result.output.shape[:3], dim_out)).astype(self.dtype)
    self.sow("intermediates", "output", y)
    return y

  def _project(
    self, x: Float[Array, "b h w c"], dim_v: int, *, train: bool
  ) -> tuple[Float[Array, "b h w i k"], Float[Array, "b h w u k"], Float[Array, "b h w u v"]]:
    """Projects to queries, keys and values with one matrix product, and normalises two of them."""
    sizes = (self.num_heads * self.dim_k, self.dim_u * self.dim_k, self.dim_u * dim_v)
    projection = nn.Dense(
      sum(sizes),
      use_bias=self.qkv_bias,
      kernel_init=_columns(sizes, self._projection_stds(x.shape[-1])),
      dtype=self.dtype,
      name="qkv",
    )
    queries, keys, values = jnp.split(projection(x), (sizes[0], sizes[0] + sizes[1]), axis=-1)
    norm = self.norm or functools.partial(BatchNorm, dtype=self.dtype)
    queries = norm(name="query_norm")(queries, train=train)
    values = norm(name="value_norm")(values, train=train)
    grid = x.shape[:3]
    return (
      queries.reshape(*grid, self.num_heads, self.dim_k),
      keys.reshape(*grid, self.dim_u, self.dim_k),
      values.reshape(*grid, self.dim_u, dim_v),
    )

  def _embeddings(self, map_size: tuple[int, ...]) -> Float[Array, "dy dx u k"]:
    name = "position_embedding"
    if self.has_variable("params", name):  # of whatever map it was made for
      return self.get_variable("params", name)
    sides = tuple(2 * side - 1 for side in map_size)
    std = 1.0 if self.initialization == "paper" else 0.02
    if self.receptive_field is not None:
      sides = (self.receptive_field, self.receptive_field)
      std = 1.0 if self.initialization == "paper" else self.dim_k**-0.5
    return self.param(name, nn.initializers.normal(std), (*sides, self.dim_u, self.dim_k))

  def _projection_stds(self, dim_in: int) -> tuple[float, float, float]:
    std = dim_in**-0.5
    if self.initialization == "timm":
      return std, std, std
    return std * self.dim_k**-0.5, std, std

  def _pool(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d"]:
    if self.stride == 1:
      return x
    padding = ((self.pool_size // 2 if self.pool_size % 2 else 0,) * 2,) * 2
    window = (self.pool_size, self.pool_size)
    return nn.avg_pool(x, window, (self.stride,) * 2, padding, count_include_pad=False)

  def _check(self, dim_out: int, map_size: tuple[int, ...]) -> None:
    check_positive(self, "dim_k", "dim_u", "num_heads", "receptive_field")
    if dim_out % self.num_heads:
      raise ValueError(
        f"dim_out {dim_out} is not a multiple of num_heads {self.num_heads}; "
        "every head answers with the same number of channels"
      )
    if self.receptive_field is not None and self.receptive_field % 2 == 0:
      raise ValueError(
        f"receptive_field must be odd, not {self.receptive_field}: it has a centre, the query"
      )
    if self.initialization not in INITIALIZATIONS:
      raise ValueError(unknown_name("initialization", self.initialization, INITIALIZATIONS))
    if (self.stride, self.pool_size) not in ((1, 2), (1, 3), (2, 2), (2, 3)):
      raise ValueError(
        f"stride {self.stride} with pool_size {self.pool_size}: stride is 1 or 2, pool_size 2 or 3"
      )
    if min(map_size) < self.stride:
      raise ValueError(f"a map of {map_size} is too small for stride {self.stride}")


def _columns(sizes: tuple[int, ...], stds: tuple[float, ...]) -> Initializer:
  """Initialises a kernel whose groups of columns have deviations of their own."""

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    scales = jnp.repeat(jnp.asarray(stds, dtype), jnp.asarray(sizes), total_repeat_length=shape[-1])
    return jax.random.normal(key, shape, dtype) * scales[None]

  return init
