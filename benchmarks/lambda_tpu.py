r"""LambdaResNet's forward pass compiled for a TPU chip: FLOPs, traffic, memory of embeddings.

The LambdaNetworks paper (arXiv:2102.08602; batch 128, 224 px) compares ResNet-50s with global
context: self-attention needs 120 GB for its maps, lambda layers 1.9 GB (0.95 GB with k = 8) for the
position embeddings of all pairs of positions, of all layers, in float32. The table has

  * embeddings: the paper's figure from this model's layers, counted after their strides, and in
    brackets at the resolution where they are applied here. Independent of the batch;
  * attention maps: 8 heads in float32, counted after the strides. Proportional to the batch;
  * temporaries of a forward pass by the compiler, where layers share memory.

  pip install -e '.[plan]'
  python benchmarks/lambda_tpu.py
  python benchmarks/lambda_tpu.py --models=lambda_resnet_50_llll --key_depths=16,8
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import timing
from flax import linen as nn
from tpu_compile import compile_for_core

from vit_jax_zoo.planning.hardware import Machine, find_machine
from vit_jax_zoo.planning.plan import gib, seconds
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer

HEADER = (
  "model", "k", "TFLOP", "traffic, GB", "temporaries", "embeddings (as applied)", "attention maps",
  "time, at least",
)  # fmt: skip
HEADS = 8
"""Heads of the attention in the paper's comparison."""


def lambda_layers(model: Any, images: jax.ShapeDtypeStruct) -> list[tuple[int, int, int]]:
  """Returns positions, stride and key depth of each lambda layer, by tracing the model."""
  layers = []

  def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, LambdaLayer) and context.method_name == "__call__":
      _, height, width, _ = args[0].shape
      layers.append((height * width, context.module.stride, context.module.dim_k))
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    abstract_variables(model, images)
  return layers


def abstract_variables(model: Any, images: jax.ShapeDtypeStruct) -> Any:
  """Returns the shapes of a model's variables."""
  init = lambda rng, x: model.init(rng, x, train=False)  # noqa: E731
  return jax.eval_shape(init, jax.random.key(0), images)


def measure(name: str, key_depth: int, images: jax.ShapeDtypeStruct, machine: Machine) -> list[str]:
  """Compiles one forward pass and returns its row."""
  fields = {"lambda_layer": {"dim_k": key_depth}} if key_depth != 16 else {}
  model = create_model(name, num_classes=1000, dtype="bfloat16", **fields)
  variables = abstract_variables(model, images)

  def forward(variables: Any, images: jax.Array) -> jax.Array:
    return model.apply(variables, images, train=False)["logits"]

  layers = lambda_layers(model, images)
  applied = sum(4.0 * k * n**2 for n, _, k in layers)
  embeddings = sum(4.0 * k * (n // stride**2) ** 2 for n, stride, k in layers)
  attention = sum(4.0 * HEADS * len(images) * (n // stride**2) ** 2 for n, stride, _ in layers)
  cost = compile_for_core(forward, (variables, images), machine)
  return [
    name,
    str(key_depth),
    f"{cost.flops / 1e12:.3f}",
    f"{cost.memory_bytes / 1e9:.1f}",
    gib(cost.temporary_bytes),
    f"{gib(embeddings)} ({gib(applied)})",
    gib(attention),
    f"{seconds(cost.bound.step)} ({cost.bound.bound})",
  ]


def main() -> None:
  """Compiles each model with each key depth and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--topology", default="v5e:1x1", help="TPU slice; one chip of it is used")
  parser.add_argument("--models", default="lambda_resnet_50_llll,lambda_resnet_50_cccc")
  parser.add_argument("--key_depths", default="16", help="the paper's |k|")
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument("--image_size", type=int, default=224, help="in pixels")
  flags = parser.parse_args()
  machine = find_machine("tpu", flags.topology)
  size = flags.image_size
  images = jax.ShapeDtypeStruct((flags.batch_size, size, size, 3), jnp.bfloat16)
  rows = [
    measure(name, int(depth), images, machine)
    for name in flags.models.split(",")
    for depth in flags.key_depths.split(",")
  ]
  print(f"{flags.topology}, {flags.batch_size} images of {size} px, bfloat16, forward pass\n")
  print(timing.markdown(HEADER, rows))


if __name__ == "__main__":
  main()
