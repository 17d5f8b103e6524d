r"""A training step of LambdaResNet and of EfficientNet, compiled for a TPU core that is not here.

The paper (arXiv:2102.08602) compares models of the same ImageNet accuracy: LambdaResNet-152 on 288
pixels with EfficientNet-B7 on 600 (86.7 % both, with extra data; 1620 and 170 images/s of training
on 8 cores of TPU v3), and, on ImageNet alone, the C4 form on 320 pixels with EfficientNet-B6 on 528
(84.0 % both). Printed are FLOPs, bytes and the least time an image by what the compiler says, and
each model's distance from the first of its group. It is a bound, from peaks: that a TPU is slow at
depthwise convolutions is not in it.

  pip install -e '.[plan]'
  python benchmarks/rivals_for_tpu.py
  python benchmarks/rivals_for_tpu.py --batch_size=4 --groups=2
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from implementations import efficientnet
from tpu_compile import compile_for_core

from vit_jax_zoo.planning.hardware import Machine, find_machine
from vit_jax_zoo.planning.report import gib, seconds
from vit_jax_zoo.registry import create_model

_TOPOLOGY = flags.DEFINE_string("topology", "v3:2x2", "One core of it is planned for.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Images of the core.")
_GROUPS = flags.DEFINE_list("groups", ["1", "2"], "Which comparisons to make.")


class Rival(NamedTuple):
  """A model on images of one size, with the training speed that the paper prints."""

  name: str
  side: int
  paper: float | None = None


RIVALS = {
  "1": (Rival("lambda_resnet_152", 288, 1620), Rival("efficientnet_b7", 600, 170)),
  "2": (Rival("lambda_resnet_152_c4", 320), Rival("efficientnet_b6", 528)),
}


class Cost(NamedTuple):
  """What an image of a training step costs."""

  flops: float
  memory_bytes: float
  temporaries: float
  step: float
  bound: str


def create(rival: Rival) -> Any:
  """Returns the model, in half precision."""
  if rival.name in efficientnet.SIZES:
    return efficientnet.create(rival.name, dtype="bfloat16")
  return create_model(rival.name, num_classes=1000, dtype="bfloat16")


def measure(rival: Rival, machine: Machine) -> Cost:
  """Compiles loss, gradients and an update with momentum."""
  model, optimizer = create(rival), optax.sgd(0.1, momentum=0.9)
  images = jax.ShapeDtypeStruct((_BATCH.value, rival.side, rival.side, 3), jnp.bfloat16)
  labels = jax.ShapeDtypeStruct((_BATCH.value,), jnp.int32)

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

  rngs = {"dropout": jax.random.key(1)}
  arguments = *jax.eval_shape(init, images), images, labels
  needs, count = compile_for_core(step, arguments, machine, donate=(0, 1, 2)), _BATCH.value
  return Cost(
    needs.flops / count,
    needs.memory_bytes / count,
    needs.temporaries,
    needs.least.step / count,
    needs.least.bound,
  )


def rows(group: Sequence[Rival], machine: Machine) -> None:
  """Prints a group, each model as soon as it is compiled."""
  first = None
  for rival in group:
    cost = measure(rival, machine)
    first = first or cost
    paper = f"{group[0].paper / rival.paper:.1f}" if group[0].paper and rival.paper else "-"
    print(
      f"| {rival.name} | {rival.side} | {cost.flops / 1e9:.0f} | {cost.memory_bytes / 1e9:.2f} | "
      f"{gib(cost.temporaries)} | {seconds(cost.step)} ({cost.bound}) | "
      f"{cost.step / first.step:.1f} | {paper} |",
      flush=True,
    )


def main(argv: list[str]) -> None:
  """Prints a table."""
  del argv
  machine = find_machine("tpu", _TOPOLOGY.value)
  print(f"a core of {_TOPOLOGY.value}, {_BATCH.value} images, bfloat16, training\n")
  print(
    "| model | pixels | GFLOP an image | GB moved an image | temporaries | least time an image | "
    "times the first's | by the paper's images/s |"
  )
  print("|---|--:|--:|--:|--:|--:|--:|--:|")
  for name in _GROUPS.value:
    rows(RIVALS[name], machine)


if __name__ == "__main__":
  app.run(main)
