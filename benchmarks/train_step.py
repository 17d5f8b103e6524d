r"""Train and evaluation steps: time, throughput, FLOP/s, MFU, compile time, memory.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model=vit_b16 --batch_size=256 --dtype=bfloat16
    python benchmarks/train_step.py --remat=none,dots,full --scan=true,false

The batch is on the devices in advance, so that only the step is measured. Remat policies, scanned
and unrolled layers and a large matrix product run alternately. For a comparison with timm, see
`peers.py --pairs=vit`.

* GFLOP: matrix products and convolutions of a step, from the jaxpr, with all loop iterations and
  recomputation.
* GFLOP/s: GFLOP divided by the wall time.
* of matmul: GFLOP/s relative to a large square matrix product of the same dtype on one device.
* MFU: FLOPs without recomputation, divided by the time and the devices' peak, where that is known.
* CPU s: CPU time of all threads per step, if the step runs on the CPU.
* compile s: tracing, lowering and compiling. temp MB: temporaries of one device by the compiler.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import timing

from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.registry import create_model, sharding_rules
from vit_jax_zoo.tasks.classification import Classification
from vit_jax_zoo.training import host, sharding
from vit_jax_zoo.training.progress import peak_flops
from vit_jax_zoo.training.train_step import (
  Program,
  TrainingOptions,
  abstract_batch_of,
  build_program,
)

OPTIMIZER = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0}
HEADER = (
  "step", "ms", "images/s", "CPU s", "GFLOP", "GFLOP/s", "of matmul", "MFU", "compile s", "temp MB",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
  """A row of the table."""

  name: str
  run: timing.Run
  flops: float  # of a step, with recomputation
  model_flops: float  # without recomputation
  compile_seconds: float | None = None
  temporary_bytes: int | None = None  # of one device
  images: int = 0  # per step


def make_batch(flags: argparse.Namespace) -> dict[str, np.ndarray]:
  """Returns a random batch."""
  rng = np.random.default_rng(0)
  size = (flags.batch_size, flags.image_size, flags.image_size, 3)
  return {
    "image": rng.integers(0, 256, size, dtype=np.uint8),
    "label": rng.integers(0, flags.num_classes, flags.batch_size, dtype=np.int32),
  }


def make_program(flags: argparse.Namespace, remat: str, scan: bool) -> Program:  # noqa: FBT001
  """Returns the compiled steps of the model on all devices."""
  fields: dict[str, Any] = {"num_classes": flags.num_classes, "dtype": flags.dtype}
  if flags.attention:
    fields["attention_implementation"] = flags.attention
  model = create_model(flags.model, remat=remat, scan_layers=scan, **fields)
  return build_program(
    Classification(model, num_classes=flags.num_classes),
    abstract_batch_of(make_batch(flags), flags.batch_size),
    TrainingOptions(optimizer=OPTIMIZER, num_steps=10_000),
    mesh=sharding.create_mesh({"data": -1}),
    rules=sharding_rules(flags.model),
  )


def cases(flags: argparse.Namespace, remat: str, scan: bool) -> Iterator[Case]:  # noqa: FBT001
  """Compiles the train step, and without remat the evaluation step."""
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
  plain = make_program(flags, "none", scan)
  yield Case(
    f"train, {name}",
    run_train,
    flops=count_flops(program.train_step, program.abstract_state, program.abstract_batch),
    model_flops=count_flops(plain.train_step, plain.abstract_state, plain.abstract_batch),
    compile_seconds=seconds,
    temporary_bytes=train.memory_analysis().temp_size_in_bytes,
    images=flags.batch_size,
  )
  if remat != "none":  # no effect without a backward pass
    return
  variables = program.initial_state(seed=0).variables
  predict, seconds = compiled(program.predict_step, variables, batch)

  def run_predict(count: int) -> None:
    for _ in range(count):
      predictions = predict(variables, batch)
    jax.block_until_ready(predictions)

  flops = count_flops(program.predict_step, variables, batch)
  yield Case(
    f"evaluate, {'scanned' if scan else 'unrolled'}",
    run_predict,
    flops=flops,
    model_flops=flops,
    compile_seconds=seconds,
    temporary_bytes=predict.memory_analysis().temp_size_in_bytes,
    images=flags.batch_size,
  )


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
  """Returns the compiled function and the compile time in seconds."""
  start = time.perf_counter()
  result = function.lower(*args).compile()
  return result, time.perf_counter() - start


def matmul(dtype: str) -> Case:
  """Returns a large square matrix product on one device."""
  side = 2048 if jax.default_backend() == "cpu" else 8192
  a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
  product = jax.jit(lambda x: (x @ a) * side**-0.5)

  def run(count: int) -> None:
    x = a
    for _ in range(count):
      x = product(x)
    x.block_until_ready()

  return Case(f"matmul {side}, {dtype}", run, 2 * side**3, 2 * side**3)


def row(case: Case, times: list[timing.Seconds], best: float) -> list[str]:
  """Returns the row of a case; `best` is the FLOP/s of the matrix product."""
  wall = [t.wall for t in times]
  middle = statistics.median(wall)
  cpu = statistics.median(t.cpu for t in times)
  peak = peak_flops(jax.devices()[0].device_kind)
  speed = case.flops / middle
  utilisation = peak and case.model_flops / middle / (peak * jax.device_count())
  seconds, memory = case.compile_seconds, case.temporary_bytes
  return [
    case.name,
    timing.spread([1e3 * t for t in wall]),
    timing.spread([case.images / t for t in wall]) if case.images else "-",
    f"{cpu:.3g}" if jax.default_backend() == "cpu" else "-",
    f"{case.flops / 1e9:.4g}",
    f"{speed / 1e9:.4g}",
    f"{speed / (best * (jax.device_count() if case.images else 1)):.0%}",
    f"{utilisation:.1%}" if utilisation and case.images else "-",
    "-" if seconds is None else f"{seconds:.1f}",
    "-" if memory is None else f"{memory / 1e6:.0f}",
  ]


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="vit_s16")
  parser.add_argument("--batch_size", type=int, default=8, help="images on all devices")
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--num_classes", type=int, default=1000)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--remat", default="none", help="remat policies, separated by commas")
  parser.add_argument("--scan", default="true", help="scanned layers: true, false or true,false")
  parser.add_argument("--attention", choices=("xla", "cudnn"), help="default: chosen by JAX")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=2.0, help="approximate length of a turn")
  return parser.parse_args()


def main() -> None:
  """Compiles all cases, times them alternately and prints the table."""
  flags = parse()
  host.keep_freed_memory()  # as the commands do
  print(timing.machine())
  size, batch = flags.image_size, flags.batch_size
  print(f"{flags.model}, {batch} images of {size}x{size}, {flags.dtype}\n")
  with jax.set_mesh(sharding.create_mesh({"data": -1})):
    scans = [text == "true" for text in flags.scan.split(",")]
    rows = [c for s in scans for r in flags.remat.split(",") for c in cases(flags, r, s)]
    rows.append(matmul(flags.dtype))
    runs = {case.name: case.run for case in rows}
    times = timing.alternate(runs, rounds=flags.rounds, seconds=flags.seconds)
  best = rows[-1].flops / statistics.median(t.wall for t in times[rows[-1].name])
  cells = [row(c, times[c.name], best) for c in sorted(rows, key=lambda c: c.name.split(",")[0])]
  print(timing.markdown(HEADER, cells))
  print(f"\nmedian (range) of {flags.rounds} rounds; at the end: {timing.machine()}")


if __name__ == "__main__":
  main()
