r"""LambdaResNet's forward pass, compiled for a TPU that is not here: FLOPs, bytes, memory.

The paper's table (arXiv:2102.08602, batch 128, 224 pixels) compares ResNet-50s whose layers see the
whole image: global attention takes 120 GB and does not run, lambda layers take 1.9 GB, 0.95 GB with
a key depth of 8. That is the memory of the position embeddings of all pairs of positions, in
float32, of all layers at once; it does not grow with the batch. Printed are

  * that figure by the paper's formula, from the layers that this model really has, counted on the
    maps behind their strides, as the paper does it, and on those that they are applied to here;
  * what attention maps would take, counted the first way, with 8 heads: they grow with the batch;
  * what the compiler says: temporaries of a whole forward pass, where layers share their room.

  pip install -e '.[plan]'
  python benchmarks/lambda_for_tpu.py
  python benchmarks/lambda_for_tpu.py --models=lambda_resnet_50_llll --key_depths=16,8
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import linen as nn
from tpu_compile import compile_for_core

from vit_jax_zoo.planning.hardware import Machine, find_machine
from vit_jax_zoo.planning.report import gib, seconds
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:1x1", "One chip.")
_MODELS = flags.DEFINE_list(
  "models", ["lambda_resnet_50_llll", "lambda_resnet_50_cccc"], "Models of the paper's ablations."
)
_KEY_DEPTHS = flags.DEFINE_list("key_depths", ["16"], "The paper's |k|.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Side of the images, in pixels.")

HEADS = 8
"""Of the attention that the paper compares with; 120 GB are 8 heads in float32 at batch 128."""


def lambda_maps(model: Any, images: jax.ShapeDtypeStruct) -> list[tuple[int, int, int]]:
  """Returns positions, stride and key depth of each lambda layer of a model, by tracing it."""
  found = []

  def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, LambdaLayer) and context.method_name == "__call__":
      _, height, width, _ = args[0].shape
      found.append((height * width, context.module.stride, context.module.dim_k))
    return call(*args, **kwargs)

  with nn.intercept_methods(watch):
    abstract_variables(model, images)
  return found


def abstract_variables(model: Any, images: jax.ShapeDtypeStruct) -> Any:
  """Returns the shapes of a model's variables."""
  init = lambda rng, x: model.init(rng, x, train=False)  # noqa: E731
  return jax.eval_shape(init, jax.random.key(0), images)


def measure(name: str, key_depth: int, machine: Machine) -> str:
  """Compiles one forward pass; returns its row."""
  images = jax.ShapeDtypeStruct((_BATCH.value, _SIZE.value, _SIZE.value, 3), jnp.bfloat16)
  fields = {"lambda_layer": {"dim_k": key_depth}} if key_depth != 16 else {}
  model = create_model(name, num_classes=1000, dtype="bfloat16", **fields)
  variables = abstract_variables(model, images)

  def forward(variables: Any, images: jax.Array) -> jax.Array:
    return model.apply(variables, images, train=False)["logits"]

  maps = lambda_maps(model, images)
  applied = sum(4.0 * k * n**2 for n, _, k in maps)
  embeddings = sum(4.0 * k * (n // stride**2) ** 2 for n, stride, k in maps)
  attention = sum(4.0 * HEADS * _BATCH.value * (n // stride**2) ** 2 for n, stride, _ in maps)
  needs = compile_for_core(forward, (variables, images), machine)
  return (
    f"| {name} | {key_depth} | {needs.flops / 1e12:.3f} | {needs.memory_bytes / 1e9:.1f} | "
    f"{gib(needs.temporaries)} | {gib(embeddings)} ({gib(applied)}) | {gib(attention)} | "
    f"{seconds(needs.least.step)} ({needs.least.bound}) |"
  )


def main(argv: list[str]) -> None:
  """Prints one row for each model and key depth."""
  del argv
  machine = find_machine("tpu", _TOPOLOGY.value)
  print(f"{_TOPOLOGY.value}, {_BATCH.value} images of {_SIZE.value} pixels, bfloat16, forward\n")
  print(
    "| model | k | TFLOP | GB moved | temporaries | embeddings (as applied) | attention maps | "
    "least time |"
  )
  print("|---|--:|--:|--:|--:|--:|--:|--:|")
  for name in _MODELS.value:
    for depth in _KEY_DEPTHS.value:
      print(measure(name, int(depth), machine), flush=True)


if __name__ == "__main__":
  app.run(main)
