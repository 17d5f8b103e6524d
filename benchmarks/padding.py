r"""Padding of batches of images of different sizes: wasted pixels and number of shapes.

    python benchmarks/padding.py [--batch_size=64] [--steps=512] [--images=20000] [--seed=0]

XLA compiles a step once per batch shape, so there should be few shapes, and computes padding like
pixels, so there should be little padding. Images have COCO's most frequent sizes (see `SIZES`) and
go through DETR's augmentation, of which only the sizes are sampled. Overhead is the ratio of padded
to real pixels minus 1, over all batches.

* fixed: one shape for all images;
* largest: the official code's way, padding to the largest image of the batch;
* buckets, unsorted: batches in random order, in the smallest bucket that holds them;
* buckets, windows: windows of batches sorted into buckets (`data/buckets.py`), as in training.
"""

import argparse
import sys
import time

import numpy as np
import timing

from vit_jax_zoo.data import buckets
from vit_jax_zoo.data.transforms import build_transforms

SIZES = {
  (480, 640): 28, (427, 640): 17, (640, 480): 11, (640, 427): 5, (426, 640): 5, (425, 640): 5,
  (428, 640): 3, (424, 640): 3, (375, 500): 4, (333, 500): 3, (500, 375): 2, (640, 640): 2,
  (612, 612): 2, (640, 426): 2, (360, 640): 2, (640, 425): 2, (500, 333): 1, (500, 500): 1,
  (480, 480): 1, (429, 640): 1,
}  # fmt: skip
"""(height, width): approximate percentage of COCO's images; not counted from the dataset."""

AUGMENTATION = [dict(name="random_flip"), dict(name="random_scale_crop")]


def main() -> None:
  """Plans the batches in every way and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--steps", type=int, default=512)
  parser.add_argument("--images", type=int, default=20_000)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  if flags.steps < buckets.WINDOW:
    sys.exit(f"--steps: {flags.steps}; expected at least one window of {buckets.WINDOW} batches")
  forecast = make_forecast(flags.images, flags.seed)
  sizes = np.array(forecast.run(flags.seed, range(flags.steps * flags.batch_size)))
  rows = [fixed(sizes), largest(sizes, flags.batch_size), largest(sizes, 4)]
  for count in (2, 4, 6, 8, 12):
    chosen = buckets.find_buckets(forecast, count, flags.seed)
    rows.append(unsorted(sizes, flags.batch_size, chosen))
    rows += [planned(forecast, sizes, flags, chosen, window) for window in (32, buckets.WINDOW)]
  print(timing.machine("numpy"))
  print(f"{flags.steps} batches of {flags.batch_size} images, seed {flags.seed}")
  print(timing.markdown(["batches", "shapes used", "overhead", "planning, ms/step"], rows))


def make_forecast(images: int, seed: int) -> buckets.Forecast:
  """Returns the size forecast of a dataset of `images` images with COCO's sizes."""
  weights = np.array(list(SIZES.values()), np.float64)
  rng = np.random.default_rng(seed)
  chosen = rng.choice(len(SIZES), images, p=weights / weights.sum())
  return buckets.Forecast(np.array(list(SIZES))[chosen], build_transforms(AUGMENTATION))


def fixed(sizes: np.ndarray) -> list[str]:
  """One shape for all images."""
  shape = -(-sizes.max(axis=0) // buckets.MULTIPLE) * buckets.MULTIPLE
  waste = len(sizes) * int(shape.prod()) / int(sizes.prod(axis=1).sum()) - 1
  return [f"fixed, {shape[0]}x{shape[1]}", "1", f"{waste:.1%}", "-"]


def largest(sizes: np.ndarray, batch_size: int) -> list[str]:
  """Each batch has its largest height and width."""
  batches = sizes.reshape(-1, batch_size, 2)
  shapes = batches.max(axis=1)
  waste = batch_size * int(shapes.prod(axis=1).sum()) / int(sizes.prod(axis=1).sum()) - 1
  count = len(np.unique(shapes, axis=0))
  return [f"largest in the batch of {batch_size}", str(count), f"{waste:.1%}", "-"]


def unsorted(sizes: np.ndarray, batch_size: int, chosen: buckets.Buckets) -> list[str]:
  """Batches in random order, each in the smallest bucket that holds it."""
  batches = sizes.reshape(-1, batch_size, 2)
  shapes = [chosen.find(*map(int, batch.max(axis=0))) for batch in batches]
  return _row(f"{len(chosen.shapes)} buckets, unsorted", sizes, batch_size, shapes, None)


def planned(
  forecast: buckets.Forecast,
  sizes: np.ndarray,
  flags: argparse.Namespace,
  chosen: buckets.Buckets,
  window: int,
) -> list[str]:
  """Batches as planned by `train_batches`."""
  plan = buckets.TrainPlan(forecast, flags.seed, flags.batch_size, chosen.shapes, window)
  start = time.perf_counter()
  windows = [plan.plan_window(number) for number in range(flags.steps // window)]
  milliseconds = (time.perf_counter() - start) / flags.steps * 1e3
  shapes = [shape for _, shapes in windows for shape in shapes]
  name = f"{len(chosen.shapes)} buckets, windows of {window}"
  return _row(name, sizes, flags.batch_size, shapes, milliseconds)


def _row(
  name: str, sizes: np.ndarray, batch_size: int, shapes: list, milliseconds: float | None
) -> list[str]:
  padded = batch_size * sum(height * width for height, width in shapes)
  real = int(sizes[: batch_size * len(shapes)].prod(axis=1).sum())
  planning = "-" if milliseconds is None else f"{milliseconds:.2f}"
  return [name, str(len(set(shapes))), f"{padded / real - 1:.1%}", planning]


if __name__ == "__main__":
  main()
