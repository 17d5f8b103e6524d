r"""Train step and evaluation step: time, images a second, FLOP/s, memory.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model=vit_b16 --batch_size=256 --dtype=bfloat16
    python benchmarks/train_step.py --remat=none,dots,full --scan=true,false

The batch lies on the devices beforehand: nothing but the step is measured. What is compared (rungs
of rematerialisation, scanned and unrolled layers, a large matrix product) is measured in turns, in
one run. How it stands beside timm: `peers.py --pairs=vit`.

* GFLOP: of a step, matrix products and convolutions, counted from the jaxpr, loops whole; what is
  rematerialised counts as often as it is done.
* GFLOP/s: that by the time.
* of matmul: GFLOP/s relative to those of a large square matrix product of the same dtype, on one
  device: what the machine gives, at this moment.
* MFU: FLOPs that the model needs (rematerialisation left out) by the time, relative to the devices'
  peak, where that is known.
* CPU s: of all threads for a step; on a busy machine the steadier time. Only where steps run on it.
* compile s: tracing, lowering and compiling. temp MB: temporary memory of one device, from the
  compiler's `memory_analysis`.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import timing

from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.registry import create_model, sharding_rules
from vit_jax_zoo.tasks.classification import Classification
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.compiled_steps import Program, Recipe, abstract_batch_of, build_program
from vit_jax_zoo.training.progress import peak_flops

OPTIMIZER = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0}
HEADER = (
  "step", "ms", "images/s", "CPU s", "GFLOP", "GFLOP/s", "of matmul", "MFU", "compile s", "temp MB",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contestant:
  """A row of the table.

  Attributes:
    name: of the row.
    run: takes so many steps, and waits for the last.
    flops: of a step, as it is done.
    model_flops: of a step, as the model needs them.
    compile_seconds: before the first step.
    temporary_bytes: on one device; None if nobody says.
    images: of a step.
  """

  name: str
  run: Callable[[int], None]
  flops: float
  model_flops: float
  compile_seconds: float | None = None
  temporary_bytes: int | None = None
  images: int = 0


def make_batch(flags: argparse.Namespace) -> dict[str, np.ndarray]:
  """Returns a batch of noise."""
  rng = np.random.default_rng(0)
  size = (flags.batch_size, flags.image_size, flags.image_size, 3)
  return {
    "image": rng.integers(0, 256, size, dtype=np.uint8),
    "label": rng.integers(0, flags.num_classes, flags.batch_size, dtype=np.int32),
  }


def make_program(flags: argparse.Namespace, remat: str, scan: bool) -> Program:  # noqa: FBT001
  """Returns the package's program for the model, over all devices."""
  fields: dict[str, Any] = {"num_classes": flags.num_classes, "dtype": flags.dtype}
  if flags.attention:
    fields["attention_implementation"] = flags.attention
  model = create_model(flags.model, remat=remat, scan_layers=scan, **fields)
  return build_program(
    Classification(model, num_classes=flags.num_classes),
    abstract_batch_of(make_batch(flags), flags.batch_size),
    Recipe(optimizer=OPTIMIZER, num_steps=10_000),
    mesh=sharding.create_mesh({"data": -1}),
    rules=sharding_rules(flags.model),
  )


def ours(flags: argparse.Namespace, remat: str, scan: bool) -> Iterator[Contestant]:  # noqa: FBT001
  """Compiles the package's train step and evaluation step."""
  program = make_program(flags, remat, scan)
  batch = sharding.to_global(make_batch(flags), program.mesh)
  state = program.initial_state(seed=0)
  train, seconds = compiled(program.train_step, state, batch)

  def run_train(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, metrics = train(state, batch)
    jax.block_until_ready((state, metrics))

  name = f"remat {remat}, {'scanned' if scan else 'unrolled'}"
  needed = make_program(flags, "none", scan)
  yield Contestant(
    f"train, ours, {name}",
    run_train,
    flops=count_flops(program.train_step, program.abstract_state, program.abstract_batch),
    model_flops=count_flops(needed.train_step, needed.abstract_state, needed.abstract_batch),
    compile_seconds=seconds,
    temporary_bytes=train.memory_analysis().temp_size_in_bytes,
    images=flags.batch_size,
  )
  if remat != "none":  # which changes nothing where there is no backward pass
    return
  variables = program.initial_state(seed=0).variables
  predict, seconds = compiled(program.predict_step, variables, batch)

  def run_predict(count: int) -> None:
    for _ in range(count):
      predictions = predict(variables, batch)
    jax.block_until_ready(predictions)

  flops = count_flops(program.predict_step, variables, batch)
  yield Contestant(
    f"evaluate, ours, {'scanned' if scan else 'unrolled'}",
    run_predict,
    flops=flops,
    model_flops=flops,
    compile_seconds=seconds,
    temporary_bytes=predict.memory_analysis().temp_size_in_bytes,
    images=flags.batch_size,
  )


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
  """Returns the function, compiled for these arguments, and how long that took."""
  start = time.perf_counter()
  done = function.lower(*args).compile()
  return done, time.perf_counter() - start


def matmul(dtype: str) -> Contestant:
  """Returns a large matrix product: what one device gives at best."""
  side = 2048 if jax.default_backend() == "cpu" else 8192
  a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
  product = jax.jit(lambda x: (x @ a) * side**-0.5)

  def run(count: int) -> None:
    x = a
    for _ in range(count):
      x = product(x)
    x.block_until_ready()

  return Contestant(f"matmul {side}, {dtype}", run, 2 * side**3, 2 * side**3)


def row(contestant: Contestant, times: list[timing.Seconds], best: float) -> list[str]:
  """Returns the cells of a contestant's row; `best` is the matrix product's FLOP/s."""
  wall = [t.wall for t in times]
  middle = statistics.median(wall)
  cpu = statistics.median(t.cpu for t in times)
  peak = peak_flops(jax.devices()[0].device_kind)
  speed = contestant.flops / middle
  utilisation = peak and contestant.model_flops / middle / (peak * jax.device_count())
  seconds, memory = contestant.compile_seconds, contestant.temporary_bytes
  return [
    contestant.name,
    timing.spread([1e3 * t for t in wall]),
    timing.spread([contestant.images / t for t in wall]) if contestant.images else "-",
    f"{cpu:.3g}" if jax.default_backend() == "cpu" else "-",
    f"{contestant.flops / 1e9:.4g}",
    f"{speed / 1e9:.4g}",
    f"{speed / (best * (jax.device_count() if contestant.images else 1)):.0%}",
    f"{utilisation:.1%}" if utilisation and contestant.images else "-",
    "-" if seconds is None else f"{seconds:.1f}",
    "-" if memory is None else f"{memory / 1e6:.0f}",
  ]


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="vit_s16")
  parser.add_argument("--batch_size", type=int, default=8, help="images, on all devices together")
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--num_classes", type=int, default=1000)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--remat", default="none", help="rungs, separated by commas")
  parser.add_argument("--scan", default="true", help="true, false or true,false")
  parser.add_argument("--attention", choices=("xla", "cudnn"), help="by default, JAX chooses")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
  return parser.parse_args()


def _said(contestant: Contestant) -> Contestant:
  """Says on stderr how far the preparation has come: it can take longer than the measurement."""
  print(f"ready: {contestant.name}", file=sys.stderr)
  return contestant


def main() -> None:
  """Compiles everything, measures in turns, prints the table."""
  flags = parse()
  print(timing.machine())
  size, batch = flags.image_size, flags.batch_size
  print(f"{flags.model}, {batch} images of {size}x{size}, {flags.dtype}\n")
  with jax.set_mesh(sharding.create_mesh({"data": -1})):
    scans = [text == "true" for text in flags.scan.split(",")]
    rows = [_said(c) for s in scans for r in flags.remat.split(",") for c in ours(flags, r, s)]
    rows.append(matmul(flags.dtype))
    runs = {contestant.name: contestant.run for contestant in rows}
    times = timing.in_turns(runs, rounds=flags.rounds, seconds=flags.seconds)
  best = rows[-1].flops / statistics.median(t.wall for t in times[rows[-1].name])
  cells = [row(c, times[c.name], best) for c in sorted(rows, key=lambda c: c.name.split(",")[0])]
  print(timing.markdown(HEADER, cells))
  print(f"\nmedian (range) of {flags.rounds} rounds; afterwards: {timing.machine()}")


if __name__ == "__main__":
  main()
