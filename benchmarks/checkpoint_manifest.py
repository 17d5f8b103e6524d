r"""Cost of a checkpoint's manifest, with checksums of its files; the target is 5 % of a save.

    python benchmarks/checkpoint_manifest.py
    python benchmarks/checkpoint_manifest.py --model=vit_l16 --folder=/mnt/disk --rounds=9

Saves random parameters and moments of Adam, and times each save until it is complete on disk, and
the manifest within it. A save is background work: training continues meanwhile.
"""

import argparse
import pathlib
import tempfile
import time
import unittest.mock
from typing import Any

import jax
import numpy as np
import timing

from vit_jax_zoo import create_model
from vit_jax_zoo.training import checkpoint


def make_state(name: str) -> dict[str, Any]:
  """Returns random numbers in the shapes of a model's parameters, and of Adam's two moments."""
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(create_model(name, num_classes=1000).init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  return {
    part: jax.tree.map(lambda x: jax.numpy.asarray(rng.standard_normal(x.shape, x.dtype)), shapes)
    for part in ("params", "mu", "nu")
  }


class Timed:
  """A function that adds up the time of its calls."""

  def __init__(self, function: Any):
    self._function, self.wall, self.cpu = function, 0.0, 0.0

  def __call__(self, *args: Any) -> Any:
    """Calls the function."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
      return self._function(*args)
    finally:
      self.wall += time.perf_counter() - wall
      self.cpu += time.process_time() - cpu


def measure(folder: pathlib.Path, state: Any, rounds: int) -> list[tuple[Timed, Timed]]:
  """Returns the times of saves, and of the manifests in them, after one to warm up."""
  found = []
  with checkpoint.Checkpointer(folder) as checkpointer:
    for step in range(rounds + 1):
      manifest = Timed(checkpoint._checksums)
      with unittest.mock.patch.object(checkpoint, "_checksums", manifest):
        save = Timed(lambda step=step: checkpointer.save(step, state) and checkpointer.wait())
        save()
      found.append((save, manifest))
  return found[1:]


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="vit_b16")
  parser.add_argument("--folder", help="where to save; default: the temporary directory")
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args()
  state = make_state(flags.model)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
  with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
    times = measure(pathlib.Path(folder), state, flags.rounds)
  rows = [
    [
      title,
      timing.spread([getattr(save, kind) for save, _ in times]),
      timing.spread([getattr(manifest, kind) for _, manifest in times]),
      timing.spread([100 * getattr(m, kind) / getattr(s, kind) for s, m in times], ".1f") + " %",
    ]
    for title, kind in (("wall time", "wall"), ("CPU time", "cpu"))
  ]
  print(timing.markdown(["", "save, s", "manifest in it, s", "manifest / save"], rows))
  print(f"\n{flags.model}, {size:.2f} GB; median (range) of {flags.rounds}; {timing.machine()}")


if __name__ == "__main__":
  main()
