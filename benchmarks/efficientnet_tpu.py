r"""Train steps of LambdaResNet and EfficientNet compiled for one TPU core: FLOPs, traffic, time.

The LambdaNetworks paper (arXiv:2102.08602) compares models of the same ImageNet accuracy:
LambdaResNet-152 at 288 px with EfficientNet-B7 at 600 px (86.7 % with extra data; 1620 and 170
images/s on 8 cores of TPU v3), and LambdaResNet-152 C4 at 320 px with EfficientNet-B6 at 528 px
(84.0 % on ImageNet alone). The table has cost and minimum time per image, and the ratio to the
first model of each pair. The minimum is a bound from the chip's peaks, which depthwise convolutions
do not reach.

  pip install -e '.[plan]'
  python benchmarks/efficientnet_tpu.py
  python benchmarks/efficientnet_tpu.py --batch_size=4 --pairs=2
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import timing
from implementations import efficientnet
from tpu_compile import Cost, compile_for_core

from vit_jax_zoo.planning.hardware import Machine, find_machine
from vit_jax_zoo.planning.plan import gib, seconds
from vit_jax_zoo.registry import create_model

HEADER = (
  "model", "px", "GFLOP/image", "traffic/image, GB", "temporaries", "time/image, at least", "ratio",
  "ratio in the paper",
)  # fmt: skip


class Entry(NamedTuple):
  """A model with its image size and the paper's training speed in images/s."""

  name: str
  image_size: int
  paper: float | None = None


PAIRS = {
  "1": (Entry("lambda_resnet_152", 288, 1620), Entry("efficientnet_b7", 600, 170)),
  "2": (Entry("lambda_resnet_152_c4", 320), Entry("efficientnet_b6", 528)),
}


def create(name: str) -> Any:
  """Returns the model in bfloat16."""
  if name in efficientnet.SIZES:
    return efficientnet.create(name, dtype="bfloat16")
  return create_model(name, num_classes=1000, dtype="bfloat16")


def train_step_cost(entry: Entry, batch_size: int, machine: Machine) -> Cost:
  """Compiles loss, gradients and a momentum update for one core."""
  model, optimizer = create(entry.name), optax.sgd(0.1, momentum=0.9)
  size = entry.image_size
  images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.bfloat16)
  labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
  rngs = {"dropout": jax.random.key(1)}

  def init(images: jax.Array) -> tuple[Any, Any, Any]:
    others = dict(model.init(jax.random.key(0), images, train=False))
    params = others.pop("params")
    return params, others, optimizer.init(params)

  def loss(params: Any, others: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    out, changed = model.apply(
      {"params": params, **others}, images, train=True, mutable=list(others), rngs=rngs
    )
    logits = out["logits"] if isinstance(out, dict) else out
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed

  def step(params: Any, others: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
    gradients, others = jax.grad(loss, has_aux=True)(params, others, images, labels)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), others, state

  arguments = *jax.eval_shape(init, images), images, labels
  return compile_for_core(step, arguments, machine, donate=(0, 1, 2))


def rows(pair: Sequence[Entry], batch_size: int, machine: Machine) -> list[list[str]]:
  """Returns the rows of a pair."""
  costs = [train_step_cost(entry, batch_size, machine) for entry in pair]
  first = pair[0].paper
  return [
    [
      entry.name,
      str(entry.image_size),
      f"{cost.flops / batch_size / 1e9:.0f}",
      f"{cost.memory_bytes / batch_size / 1e9:.2f}",
      gib(cost.temporary_bytes),
      f"{seconds(cost.bound.step / batch_size)} ({cost.bound.bound})",
      f"{cost.bound.step / costs[0].bound.step:.1f}",
      f"{first / entry.paper:.1f}" if first and entry.paper else "-",
    ]
    for entry, cost in zip(pair, costs, strict=True)
  ]


def main() -> None:
  """Compiles the pairs and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--topology", default="v3:2x2", help="TPU slice; one core of it is used")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--pairs", default="1,2", help="comparisons: 1, 2 or 1,2")
  flags = parser.parse_args()
  machine = find_machine("tpu", flags.topology)
  table = [
    row for key in flags.pairs.split(",") for row in rows(PAIRS[key], flags.batch_size, machine)
  ]
  print(f"one core of {flags.topology}, {flags.batch_size} images, bfloat16, train step\n")
  print(timing.markdown(HEADER, table))


if __name__ == "__main__":
  main()
