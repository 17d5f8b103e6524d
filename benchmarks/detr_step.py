r"""DETR's training step and inference: images a second, beside transformers' DETR.

    python benchmarks/detr_step.py
    python benchmarks/detr_step.py --peer --image_size=480 --batch_size=2
    python benchmarks/detr_step.py --peer --model=detr_r50_dc5 --dtype=bfloat16 --batch_size=8

The batch lies on the device beforehand, its images are square and without padding. A training step
is all of it: forward, matching and losses of six decoder layers, backward, clipping, AdamW. The
peer matches on the host, with scipy; it needs torch and transformers in the same Python
(pip install 'vit_jax_zoo[parity]'), and timm for DC5. What is compared is measured in turns. CPU s:
of all threads; on a busy machine the steadier time.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import measuring
import numpy as np

from vit_jax_zoo.models.registry import create_model, sharding_rules
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.train import sharding
from vit_jax_zoo.train.program import Recipe, abstract_batch_of, build_program

CLASSES = 91
OPTIMIZER = {
  "name": "adamw",
  "learning_rate": 1e-4,
  "weight_decay": 1e-4,
  "clip_norm": 0.1,
  "rules": (
    ("backbone/(stem|c2_block).*", {"frozen": True}),
    ("backbone/.*", {"learning_rate": 0.1}),
    (".*", {"weight_decay": 1.0}),
  ),
}
"""The paper's, as in configs/detr.py."""


def make_batch(images: int, size: int, targets: int = 100, objects: int = 7) -> dict[str, Any]:
  """Returns a batch of noise, with as many objects as COCO's images have on average."""
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
    "boxes_cxcywh": rng.uniform(0.1, 0.5, (images, targets, 4)).astype(np.float32),
    "labels": rng.integers(0, CLASSES, (images, targets)).astype(np.int32),
    "is_target": np.tile(np.arange(targets) < objects, (images, 1)),
  }


def ours(flags: argparse.Namespace, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
  """Compiles the package's train step and prediction step."""
  program = build_program(
    create_task("detection", model, num_classes=CLASSES),
    abstract_batch_of(batch, flags.batch_size),
    Recipe(optimizer=OPTIMIZER, num_steps=10_000),
    mesh=sharding.create_mesh({"data": -1}),
    rules=sharding_rules(flags.model),
  )
  placed = sharding.to_global(batch, program.mesh)
  state = program.initial_state(seed=0)
  variables = program.initial_state(seed=0).variables

  def train(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, metrics = program.train_step(state, placed)
    jax.block_until_ready((state, metrics))

  def predict(count: int) -> None:
    for _ in range(count):
      predictions = program.predict_step(variables, placed)
    jax.block_until_ready(predictions)

  return {"train, ours": train, "predict, ours": predict}


def peer(flags: argparse.Namespace, model: Any, batch: Any) -> dict[str, Callable[[int], None]]:
  """Returns what transformers does for the same."""
  from detr_peer import TransformersPeer

  other = TransformersPeer(model, batch, mixed=flags.dtype == "bfloat16")
  return {"train, transformers": other.train, "predict, transformers": other.evaluate}


def main() -> None:
  """Prints a table: one row for each step."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="detr_r50")
  parser.add_argument("--batch_size", type=int, default=2)
  parser.add_argument("--image_size", type=int, default=320)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--peer", action="store_true", help="also measures transformers' DETR")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, about")
  flags = parser.parse_args()
  print(measuring.machine(*(["torch", "transformers"] if flags.peer else [])))
  model = create_model(flags.model, dtype=flags.dtype)
  batch = make_batch(flags.batch_size, flags.image_size)
  runs = ours(flags, model, batch)
  runs |= peer(flags, model, batch) if flags.peer else {}
  times = measuring.in_turns(runs, rounds=flags.rounds, seconds=flags.seconds)
  rows = [
    [
      name,
      measuring.spread([1e3 * t.wall for t in rounds]),
      measuring.spread([flags.batch_size / t.wall for t in rounds]),
      measuring.spread([t.cpu for t in rounds]),
    ]
    for name, rounds in sorted(times.items(), reverse=True)
  ]
  print(f"\n{measuring.markdown(['step', 'ms', 'images/s', 'CPU s'], rows)}")
  print(
    f"\n{flags.model}, {flags.batch_size} images of {flags.image_size} pixels, {flags.dtype}; "
    f"median (range) of {flags.rounds} rounds; afterwards: {measuring.machine()}"
  )


if __name__ == "__main__":
  main()
