"""The two-layer perceptron of a Transformer block."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vit_jax_zoo.ops.names import unknown_name

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
}
"""`gelu` is the exact one (timm, Hugging Face), `gelu_tanh` its approximation (the papers' JAX);
`quick_gelu` is a coarser one (image-gpt, CLIP)."""


class Mlp(nn.Module):
  """Dense, activation, dropout, dense, dropout.

  Attributes:
    hidden_dim: width of the layer between.
    activation: a key of `ACTIVATIONS`.
    dropout_rate: after the activation and after the output.
    use_bias: whether the two layers have biases.
    kernel_init: of both kernels.
    bias_init: of both biases.
    dtype: of the computation; parameters stay float32.
  """

  hidden_dim: int
  activation: str = "gelu_tanh"
  dropout_rate: float = 0.0
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.normal(1e-6)
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
    """Applies the same perceptron to every position."""
    if self.activation not in ACTIVATIONS:
      raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))
    dense = functools.partial(
      nn.Dense,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      bias_init=self.bias_init,
      dtype=self.dtype,
    )
    hidden = checkpoint_name(dense(self.hidden_dim, name="hidden")(x), "mlp_hidden")
    hidden = ACTIVATIONS[self.activation](hidden)
    hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=not train)
    out = dense(x.shape[-1], name="out")(hidden)
    return nn.Dropout(self.dropout_rate)(out, deterministic=not train)
