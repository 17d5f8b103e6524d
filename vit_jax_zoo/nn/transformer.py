"""Parts of Transformers: MLP, remat policies, the stack of equal layers, sharding rules."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.ops.attention import matrix_product
from vit_jax_zoo.ops.sharding import is_for_cpu

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
}
"""`gelu` is the exact one (timm, Hugging Face), `gelu_tanh` its approximation (the papers' JAX);
`quick_gelu` is a coarser one (image-gpt, CLIP)."""


class Mlp(nn.Module):
  """Dense, activation, dropout, dense, dropout."""

  hidden_dim: int
  activation: str = "gelu_tanh"  # a key of `ACTIVATIONS`
  dropout_rate: float = 0.0  # after the activation and after the output
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.normal(1e-6)
  dtype: Dtype = jnp.float32  # of the computation; parameters stay float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
    """Applies the MLP to every position."""
    check_names("activation", [self.activation], ACTIVATIONS)
    names = ("use_bias", "kernel_init", "bias_init", "dtype")
    options: dict[str, Any] = {name: getattr(self, name) for name in names}
    options["dot_general"] = matrix_product if is_for_cpu() else None
    hidden = nn.Dense(self.hidden_dim, **options, name="hidden")(x)
    hidden = ACTIVATIONS[self.activation](checkpoint_name(hidden, "mlp_hidden"))
    hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=not train)
    out = nn.Dense(x.shape[-1], **options, name="out")(hidden)
    return nn.Dropout(self.dropout_rate)(out, deterministic=not train)


_ATTENTION = ("query", "key", "value", "attention_out")
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
  "none": None,
  "dots": (*_ATTENTION, "mlp_hidden"),
  "attention": _ATTENTION,
  "full": (),
}
"""Activations (by `checkpoint_name`) that a layer saves for its backward pass besides its input.

* "none": all; nothing is recomputed.
* "dots": 8 widths per token, the products with weights except the MLP's last; norms, activations
  and the attention map are recomputed, a few per cent of the step's FLOPs.
* "attention": 4 widths per token; the MLP's first product is recomputed too.
* "full": none; the layer runs forward twice, about a third more FLOPs.
"""

UNROLLED_DEPTH = 24
"""On CPUs, the loop over at most so many scanned layers is unrolled: XLA would copy the activations
of each layer to stacked arrays, a quarter of ViT-S/16's training step."""


class Stack(nn.Module):
  """`depth` equal layers in sequence, scanned or unrolled.

  A layer is called as `layer(x, *args, **kwargs)`, with its element of `per_layer` after `x` where
  there is one, and returns the next `x` and an output (or None), as the body of `nn.scan` does.

  Scanned, parameters and intermediates are in `blocks/...` with a leading depth axis, and one layer
  is compiled (on CPUs see `UNROLLED_DEPTH`). Unrolled, they are in `block_0/...`, `block_1/...`.
  `weights.key_map` converts. `nn.share_scope(parent, stack)` puts them into the parent's own scope.
  """

  layer: Callable[..., nn.Module]  # makes a layer of the given `name`
  depth: int  # number of layers
  scan: bool = True
  remat: str = "none"  # a key of `REMAT_POLICIES`
  scanned_name: str = "blocks"
  layer_name: str = "block_{}"  # of an unrolled layer, with {} for its number
  first: int = 0  # number of the first layer

  @nn.compact
  def __call__(
    self, x: Array, *args: Any, per_layer: Sequence[float] | None = None, **kwargs: Any
  ) -> tuple[Array, Any]:
    """Returns the last layer's `x`, and the layers' outputs with a leading depth axis (or None)."""

    def body(layer: nn.Module, x: Array, value: Any) -> tuple[Array, Any]:
      values = () if per_layer is None else (value,)
      return layer(x, *values, *args, **kwargs)  # pyrefly: ignore[not-callable]

    unroll = self.depth if self.depth <= UNROLLED_DEPTH and is_for_cpu() else 1
    check_names("remat", [self.remat], REMAT_POLICIES)
    if (saved := REMAT_POLICIES[self.remat]) is not None:
      policy = jax.checkpoint_policies.save_only_these_names(*saved)
      body = nn.remat(body, policy=policy, prevent_cse=not (self.scan and unroll == 1))
    if self.scan:
      scan = nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        length=self.depth,
        unroll=unroll,
      )
      values = None if per_layer is None else jnp.asarray(per_layer)
      return scan(self.layer(name=self.scanned_name), x, values)
    outputs = []
    for i in range(self.depth):
      layer = self.layer(name=self.layer_name.format(self.first + i))
      x, output = body(layer, x, None if per_layer is None else per_layer[i])
      outputs.append(output)
    return x, jnp.stack(outputs) if outputs and outputs[0] is not None else None


SHARDING_RULES = (
  (r".*/(query|key|value)/kernel", ("fsdp", "model", None)),
  (r".*/(query|key|value)/bias", ("model", None)),
  (r".*attention/out/kernel", ("model", None, "fsdp")),
  (r".*/mlp/hidden/kernel", ("fsdp", "model")),
  (r".*/mlp/hidden/bias", ("model",)),
  (r".*/mlp/out/kernel", ("model", "fsdp")),
  (r".*(bias|scale)", ()),
  (r".*", "fsdp"),
)
"""Heads and hidden units over `model`, the other side of each matrix over `fsdp`."""
