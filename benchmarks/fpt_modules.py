r"""Time and memory of the feature pyramid transformer against the size of the image.

  python benchmarks/fpt_modules.py
  python benchmarks/fpt_modules.py --sizes=256,512,1024 --compile_only
  python benchmarks/fpt_modules.py --peer=/path/to/python/with/torch

Sizes are sides of square images; the pyramid has strides 4, 8, 16 and 32. "blocks" is the package's
way, "whole" the same with attention maps in one piece. "temp" is what the compiler sets aside
beside arguments and results. With `--peer`, the official arithmetic is run in PyTorch, too, by an
interpreter that has it (`fpt_torch.py`): the whole transformer, its attention maps in one piece;
the memory there is that by which the process grew.
"""

import functools
import json
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from timing import machine, markdown

from vit_jax_zoo.systems.fpt.attention import BLOCK_ELEMENTS
from vit_jax_zoo.systems.fpt.transformer import FLAVORS, FeaturePyramidTransformer

_SIZES = flags.DEFINE_list("sizes", ["128", "256", "512"], "Sides of images.")
_WIDTH = flags.DEFINE_integer("width", 64, "Channels of the pyramid; the paper's are 256.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Prints memory and runs nothing.")
_WHOLE_LIMIT = flags.DEFINE_float("whole_limit_gb", 4.0, "Leaves out larger forms in one piece.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each, of which the fastest counts.")
_PEER = flags.DEFINE_string("peer", None, "A Python that has PyTorch.")


def pyramid(side: int, rng: np.random.Generator | None = None) -> list[Any]:
  """Returns the levels of an image, as shapes without `rng`."""
  shapes = [(1, side // s, side // s, _WIDTH.value) for s in (4, 8, 16, 32)]
  if rng is None:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def forward(model: FeaturePyramidTransformer) -> Callable[..., Any]:
  """Returns the sum of all outputs."""
  return lambda variables, levels: sum(jnp.sum(x) for x in model.apply(variables, levels))


def seconds(run: Callable[[], Any]) -> float:
  """Returns the shortest of some runs."""
  jax.block_until_ready(run())
  times = []
  for _ in range(_ROUNDS.value):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)


def measure(flavor: str, side: int, *, whole: bool) -> list[str]:
  """Returns one row of the table."""
  block = 2**62 if whole else BLOCK_ELEMENTS
  model = FeaturePyramidTransformer(_WIDTH.value, flavor, lateral=False, block_elements=block)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pyramid(side))
  row = [f"{flavor} {side}", "whole" if whole else "blocks"]
  passes = (forward(model), jax.grad(forward(model)))
  compiled = [jax.jit(f).lower(shapes, pyramid(side)).compile() for f in passes]
  memory = [c.memory_analysis().temp_size_in_bytes / 1e9 for c in compiled]
  row += [f"{m:.3f}" for m in memory]
  if _COMPILE_ONLY.value or max(memory) > _WHOLE_LIMIT.value:
    return [*row, "", ""]
  variables = jax.jit(model.init)(jax.random.key(0), pyramid(side, np.random.default_rng(0)))
  levels = pyramid(side, np.random.default_rng(1))
  return row + [f"{seconds(functools.partial(c, variables, levels)):.3f}" for c in compiled]


def peer() -> list[list[str]]:
  """Returns the rows of the official arithmetic in PyTorch; memory is by how much it grew."""
  script = str(pathlib.Path(__file__).with_name("fpt_torch.py"))
  command = [_PEER.value, script, f"--sizes={','.join(_SIZES.value)}", f"--width={_WIDTH.value}"]
  command.append(f"--rounds={_ROUNDS.value}")
  lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
  found = [json.loads(line) for line in lines]
  return [
    [f"official {side}", "PyTorch", "", f"{grown:.3f}", f"{f:.3f}", f"{b:.3f}"]
    for side, f, b, grown in found
  ]


def main(_: list[str]) -> None:
  """Prints the table."""
  print(machine(), flush=True)
  header = ["pyramid", "attention", "temp GB", "with grad", "seconds", "with grad"]
  rows = [
    measure(flavor, int(side), whole=whole)
    for flavor in FLAVORS
    for side in _SIZES.value
    for whole in (False, True)
  ]
  print(markdown(header, rows + (peer() if _PEER.value else [])))


if __name__ == "__main__":
  app.run(main)
