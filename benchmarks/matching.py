r"""DETR's matching: time on the device, compared with optax's solver and scipy on the host.

    python benchmarks/matching.py
    python benchmarks/matching.py --step=detr_r50 --image_size=640 --batch_size=4

Costs come from random predictions and targets, for a batch of images and six decoder layers.

* ours: `match`, which skips padded targets;
* optax: `hungarian_algorithm` under vmap, with cost 0 for padded targets;
* scipy: `linear_sum_assignment` per problem, with costs fetched from the device and indices sent
  back, as a matcher on the host needs within a step.

With `--step`, the loss and gradients of that model are measured too, and the fraction of matching
in their wall and CPU time (the latter only where the step runs on the CPU).
"""

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from scipy.optimize import linear_sum_assignment

from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.detr.losses import matching_cost
from vit_jax_zoo.systems.detr.matching import match
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext

LAYERS, QUERIES, CLASSES = 6, 100, 91


def problem(images: int, padded: int, objects: float) -> tuple[Any, Any]:
  """Returns costs [b l q t] and the mask of real targets, Poisson-distributed per image."""
  rng = np.random.default_rng(0)
  is_target = np.arange(padded) < np.minimum(rng.poisson(objects, images), padded)[:, None]
  boxes = rng.uniform(0.1, 0.5, (images, padded, 4)).astype(np.float32)
  labels = rng.integers(0, CLASSES, (images, padded)).astype(np.int32)

  def repeat(x: Any) -> Any:
    return jnp.asarray(np.repeat(x[:, None], LAYERS, axis=1))

  cost = matching_cost(
    jnp.asarray(rng.normal(size=(images, LAYERS, QUERIES, CLASSES + 1)).astype(np.float32)),
    jnp.asarray(rng.uniform(0.1, 0.6, (images, LAYERS, QUERIES, 4)).astype(np.float32)),
    repeat(labels),
    repeat(boxes),
    weights=(1.0, 5.0, 2.0),
  )
  return cost, repeat(is_target)


def solvers(cost: Any, is_target: Any) -> dict[str, timing.Run]:
  """Returns the measured solvers by name."""
  ours = jax.jit(match)
  peer = jax.jit(jax.vmap(jax.vmap(optax.assignment.hungarian_algorithm)))
  padded = jnp.where(is_target[:, :, None], cost, 0)
  counts = np.asarray(is_target).sum(axis=-1)

  def on_host() -> Any:
    costs = np.asarray(jax.device_get(cost))
    pairs = np.full((2, *costs.shape[:2], costs.shape[-1]), -1, np.int32)
    for index in np.ndindex(*costs.shape[:2]):
      rows, columns = linear_sum_assignment(costs[index][:, : counts[index]])
      pairs[0][index][: len(rows)], pairs[1][index][: len(rows)] = rows, columns
    return jax.device_put(pairs)

  calls = {
    "ours": lambda: ours(cost, is_target),
    "optax": lambda: peer(padded),
    "scipy": on_host,
  }
  return {name: timing.repeated(call) for name, call in calls.items()}


def training_step(flags: argparse.Namespace, padded: int) -> timing.Run:
  """Returns a run of loss and gradients of a model, with dropout."""
  images, image_size = flags.batch_size, flags.image_size
  model = create_model(flags.step, dtype=flags.dtype)
  task = create_task("detection", model, num_classes=CLASSES)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (images, image_size, image_size, 3), dtype=np.uint8),
    "boxes_cxcywh": rng.uniform(0.1, 0.5, (images, padded, 4)).astype(np.float32),
    "labels": rng.integers(0, CLASSES, (images, padded)).astype(np.int32),
    "is_target": np.tile(np.arange(padded) < 7, (images, 1)),
  }
  variables = jax.jit(task.init)(jax.random.key(0), batch)
  batch = jax.device_put(batch)

  @jax.jit
  def step(params: Any) -> Any:
    def loss(params: Any) -> Any:
      context = LossContext(jax.random.key(1), jnp.int32(0), task.normalizers(batch))
      return task.loss({**variables, "params": params}, batch, context).loss

    return jax.grad(loss)(params)

  return timing.repeated(lambda: step(variables["params"]))


def main() -> None:
  """Measures every size of problem and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--padded", default="100,32", help="sizes that targets are padded to")
  parser.add_argument("--objects", type=float, default=7.3, help="mean objects per image (COCO)")
  parser.add_argument("--step", default="", help="model whose training step to measure")
  parser.add_argument("--image_size", type=int, default=640)
  parser.add_argument("--dtype", default="bfloat16", help="dtype of the step")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=1.0, help="approximate length of a turn")
  flags = parser.parse_args()
  print(timing.machine("optax", "scipy"))
  rows = []
  for padded in map(int, flags.padded.split(",")):
    runs = solvers(*problem(flags.batch_size, padded, flags.objects))
    if flags.step:
      runs["step"] = training_step(flags, padded)
    times = timing.alternate(runs, rounds=flags.rounds, seconds=flags.seconds)
    wall = {name: [1e3 * t.wall for t in rounds] for name, rounds in times.items()}
    row = [str(padded), *(timing.spread(wall[name]) for name in runs)]
    if flags.step:
      row += [f"{_fraction(times, 'wall'):.2%}", f"{_fraction(times, 'cpu'):.2%}"]
    rows.append(row)
  header = ["targets padded to", "ours, ms", "optax, ms", "scipy, ms"]
  header += [f"step of {flags.step}, ms", "ours / step", "CPU time"] if flags.step else []
  print(f"\n{timing.markdown(header, rows)}")
  print(
    f"\n{flags.batch_size} images x {LAYERS} layers x {QUERIES} queries, {flags.objects} objects "
    f"per image; median (range) of {flags.rounds} rounds; at the end: {timing.machine()}"
  )


def _fraction(times: dict[str, list[timing.Seconds]], field: str) -> float:
  ours, step = ([getattr(t, field) for t in times[name]] for name in ("ours", "step"))
  return statistics.median(ours) / statistics.median(step)


if __name__ == "__main__":
  main()
