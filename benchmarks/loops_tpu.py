r"""Loops of DETR's matching and of NMS: rounds counted on the CPU, their time on a TPU estimated.

A batch's loop runs until the last of its problems has ended. Costs are random, or "contested": all
targets prefer the same queries, as early in training. Boxes are random, or "crowded" around 20
objects. The time of a round is the number of instructions of the largest compiled loop body times
`--microseconds`, an assumption, or their traffic at the chip's peak, if that takes longer.

  pip install -e '.[plan]'
  python benchmarks/loops_tpu.py
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.sharding import NamedSharding, PartitionSpec
from matching import problem
from tpu_compile import compile_for_core

from vit_jax_zoo.planning import hlo
from vit_jax_zoo.planning.hardware import Machine, find_machine
from vit_jax_zoo.planning.plan import compile_text, seconds
from vit_jax_zoo.systems.detr.matching import match
from vit_jax_zoo.systems.rcnn.boxes import non_max_suppression, roi_align
from vit_jax_zoo.training.sharding import create_mesh

HEADER = ("loops", "input", "rounds", "instructions", "MB", "time", "of the step")
PROPOSALS = 2000  # of a level


def trips(function: Callable[..., Any], *args: Any) -> list[int]:
  """Returns the iterations of one example's loops, in order; those of a `fori_loop` one by one."""
  found = []

  def loop(condition: Any, body: Any, state: Any) -> Any:
    count = 0
    while condition(state):
      state, count = body(state), count + 1
    found.append(count)
    return state

  def times(start: int, stop: Any, body: Any, state: Any) -> Any:
    for i in range(start, int(stop)):
      found.append(1)
      state = body(i, state)
    return state

  replaced = mock.patch.multiple(jax.lax, while_loop=loop, fori_loop=times)
  with jax.disable_jit(), replaced:
    function(*args)
  return found


def batch_rounds(counts: list[list[int]]) -> int:
  """Returns the rounds of a batch: each loop runs as long as its slowest example."""
  length = max(map(len, counts))
  return int(np.max([c + [0] * (length - len(c)) for c in counts], axis=0).sum())


def matchings(images: int, objects: float) -> Iterator[tuple[str, Any, Any]]:
  """Yields the costs and targets of a batch's problems, one for each image and layer."""
  arrays = problem(images, 100, objects)
  cost, is_target = (x.reshape(-1, *x.shape[2:]) for x in arrays)
  yield "random", cost, is_target
  rng = np.random.default_rng(1)
  best, noise = rng.normal(size=(*cost.shape[:2], 1)), rng.normal(scale=1e-2, size=cost.shape)
  yield "contested", jnp.asarray((best + noise).astype(np.float32)), is_target


def proposals(images: int) -> Iterator[tuple[str, Any, Any]]:
  """Yields boxes [b n 4] and scores [b n] of an 800x1344 image."""
  rng = np.random.default_rng(0)
  size = np.asarray([1344, 800, 1344, 800], np.float32)
  corners = rng.uniform(0, 0.8, (images, PROPOSALS, 2))
  sides = rng.uniform(0.02, 0.2, (images, PROPOSALS, 2))
  boxes = np.concatenate([corners, corners + sides], axis=-1)
  yield (
    "random",
    *map(jnp.asarray, ((boxes * size).astype(np.float32), rng.random(boxes.shape[:2]))),
  )
  objects = boxes[:, rng.integers(0, 20, PROPOSALS)]
  jitter = rng.normal(scale=0.01, size=boxes.shape)
  scores = -np.abs(jitter).sum(axis=-1)
  yield "crowded", *map(jnp.asarray, (((objects + jitter) * size).astype(np.float32), scores))


def largest_body(machine: Machine, function: Callable[..., Any], *args: Any) -> tuple[int, float]:
  """Returns the instructions of the largest innermost loop body, and the bytes that they move."""
  mesh = create_mesh({}, machine.devices[:1])
  core = NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    lowered = jax.jit(function, in_shardings=core, out_shardings=core).lower(*shapes)
    module = hlo.parse(compile_text(lowered)[1])
  loops = [i for lines in module.computations.values() for i in lines if i.opcode == "while"]
  bodies = [module.computations[loop.called[0]] for loop in loops]
  lines = max((b for b in bodies if all(i.opcode != "while" for i in b)), key=len)
  shapes = {i.name: i for i in lines}
  moved = sum(hlo._moved(module, i, shapes) for i in lines)
  return sum(i.opcode not in hlo._FREE for i in lines), moved


def crop(*arrays: Any) -> jax.Array:
  """Returns a scalar of the crops of four levels, boxes, and their levels."""
  *pyramid, boxes, level = arrays
  crops = roi_align(pyramid, boxes, level, strides=(4, 8, 16, 32), size=7)
  return jnp.sum(jnp.sin(crops.astype(jnp.float32)))


def crop_arguments(images: int, boxes: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the shapes of `crop`'s arguments for images of 800x1344."""
  sides = [(images, 800 // stride, 1344 // stride, 256) for stride in (4, 8, 16, 32)]
  maps = [jax.ShapeDtypeStruct(side, jnp.bfloat16) for side in sides]
  shape = jax.ShapeDtypeStruct
  return *maps, shape((images, boxes, 4), jnp.float32), shape((images, boxes), jnp.int32)


def main() -> None:
  """Counts, compiles and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--topology", default="v5e:2x2", help="TPU slice; one chip of it is used")
  parser.add_argument("--objects", type=float, default=7.3, help="mean objects per image (COCO)")
  parser.add_argument("--microseconds", type=float, default=1.0, help="of an instruction, assumed")
  parser.add_argument("--detr_step", type=float, default=27.5, help="ms, DETR-R50 in docs/PLANS.md")
  parser.add_argument("--rcnn_step", type=float, default=19.8, help="ms, 3.9 TFLOP of FPN on v5e")
  flags = parser.parse_args()
  machine, table = find_machine("tpu", flags.topology), []

  def add(name: str, kind: str, function: Callable[..., Any], *args: Any, step: float) -> None:
    count, moved = largest_body(machine, jax.vmap(function), *args)
    rounds = batch_rounds([trips(function, *example) for example in zip(*args, strict=True)])
    bandwidth = machine.chip.memory_bandwidth if machine.chip else float("inf")
    time = rounds * max(count * flags.microseconds * 1e-6, moved / bandwidth)
    share = f"{time / (step * 1e-3):.1%}"
    table.append([name, kind, str(rounds), str(count), f"{moved / 1e6:.2f}", seconds(time), share])

  for kind, cost, is_target in matchings(4, flags.objects):
    add("matching, 4 images x 6 layers", kind, match, cost, is_target, step=flags.detr_step)
  for kind, boxes, scores in proposals(images=2):
    suppress = functools.partial(non_max_suppression, threshold=0.7)
    name = f"NMS, 2 images x {PROPOSALS} boxes"
    add(name, kind, suppress, boxes, scores, step=flags.rcnn_step)
  cost = compile_for_core(jax.grad(crop, (0, 1, 2, 3)), crop_arguments(2, 512), machine)
  share = f"{cost.bound.step / (flags.rcnn_step * 1e-3):.1%}"
  figures = (f"{cost.memory_bytes / 1e6:.0f}", seconds(cost.bound.step), share)
  table.append(["RoIAlign and its gradients, 2 images x 512 boxes", "", "", "", *figures])
  print(f"{flags.topology}, one chip\n\n{timing.markdown(HEADER, table)}")


if __name__ == "__main__":
  main()
