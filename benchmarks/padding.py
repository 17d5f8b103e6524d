r"""Padding: how many pixels a batch of images of different sizes wastes, and in how many shapes.

    python benchmarks/padding.py [--batch_size=64] [--steps=512] [--images=20000] [--seed=0]

XLA compiles a step once for each shape of a batch, so shapes should be few, and padding is computed
like everything else, so it should be little. Images have the sizes that dominate COCO, in about the
shares they have there (see `SIZES`); they go through DETR's augmentation, without their pixels:
only sizes are drawn. The overhead is padded pixels / real pixels - 1, over all batches of the run.
"Fixed" pads all images to one shape; "as they come" pads batches in the run's own order to the
smallest bucket that holds them, as one would do without sorting; the others sort windows of batches
(`data/buckets.py`). "Largest in the batch" is what the paper's code does, on single GPUs with a few
images each; there, shapes are as many as there are batches.
"""

import argparse
import time

import numpy as np
from timing import machine, markdown

from vit_jax_zoo.data import buckets
from vit_jax_zoo.data.transforms import build_transforms

SIZES = {
  (480, 640): 28, (427, 640): 17, (640, 480): 11, (640, 427): 5, (426, 640): 5, (425, 640): 5,
  (428, 640): 3, (424, 640): 3, (375, 500): 4, (333, 500): 3, (500, 375): 2, (640, 640): 2,
  (612, 612): 2, (640, 426): 2, (360, 640): 2, (640, 425): 2, (500, 333): 1, (500, 500): 1,
  (480, 480): 1, (429, 640): 1,
}  # fmt: skip
"""(height, width): percent. Rounded, from general knowledge of the data set, not counted here."""

AUGMENTATION = [dict(name="random_flip"), dict(name="random_scale_crop")]


def main() -> None:
  """Plans the batches in each way, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--steps", type=int, default=512)
  parser.add_argument("--images", type=int, default=20_000)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  forecast = make_forecast(flags.images, flags.seed)
  sizes = np.array(
    buckets.forecast_run(forecast, flags.seed, range(flags.steps * flags.batch_size))
  )
  rows = [fixed(sizes), largest(sizes, flags.batch_size), largest(sizes, 4)]
  for count in (2, 4, 6, 8, 12):
    chosen = buckets.find_buckets(forecast, count, flags.seed)
    rows.append(as_they_come(sizes, flags.batch_size, chosen))
    rows += [planned(forecast, sizes, flags, chosen, window) for window in (32, buckets.WINDOW)]
  print(machine("numpy"))
  print(f"{flags.steps} batches of {flags.batch_size} images, seed {flags.seed}")
  print(markdown(["batches", "shapes used", "overhead", "planning, ms a step"], rows))


def make_forecast(images: int, seed: int) -> buckets.Forecast:
  """Returns the forecast for a data set of `images` with COCO's sizes."""
  shares = np.array(list(SIZES.values()), np.float64)
  rng = np.random.default_rng(seed)
  chosen = rng.choice(len(SIZES), images, p=shares / shares.sum())
  return buckets.Forecast(np.array(list(SIZES))[chosen], build_transforms(AUGMENTATION))


def fixed(sizes: np.ndarray) -> list[str]:
  """One shape for all."""
  shape = -(-sizes.max(axis=0) // buckets.MULTIPLE) * buckets.MULTIPLE
  waste = len(sizes) * int(shape.prod()) / int(sizes.prod(axis=1).sum()) - 1
  return [f"fixed, {shape[0]}x{shape[1]}", "1", f"{waste:.1%}", "-"]


def largest(sizes: np.ndarray, batch_size: int) -> list[str]:
  """Each batch as large as its largest height and width."""
  batches = sizes.reshape(-1, batch_size, 2)
  shapes = batches.max(axis=1)
  waste = batch_size * int(shapes.prod(axis=1).sum()) / int(sizes.prod(axis=1).sum()) - 1
  count = len(np.unique(shapes, axis=0))
  return [f"largest in the batch of {batch_size}", str(count), f"{waste:.1%}", "-"]


def as_they_come(sizes: np.ndarray, batch_size: int, chosen: buckets.Buckets) -> list[str]:
  """Each batch in the smallest bucket that holds it, in the run's own order."""
  batches = sizes.reshape(-1, batch_size, 2)
  shapes = [chosen.shapes[chosen.find(*map(int, batch.max(axis=0)))] for batch in batches]
  return _row(f"{len(chosen.shapes)} buckets, as they come", sizes, batch_size, shapes, None)


def planned(
  forecast: buckets.Forecast,
  sizes: np.ndarray,
  flags: argparse.Namespace,
  chosen: buckets.Buckets,
  window: int,
) -> list[str]:
  """What `train_batches` does."""
  plan = buckets.TrainPlan(forecast, flags.seed, flags.batch_size, chosen, window)
  start = time.perf_counter()
  windows = [plan.plan_window(number) for number in range(flags.steps // window)]
  took = (time.perf_counter() - start) / flags.steps * 1e3
  shapes = [shape for _, shapes in windows for shape in shapes]
  name = f"{len(chosen.shapes)} buckets, windows of {window}"
  return _row(name, sizes, flags.batch_size, shapes, took)


def _row(
  name: str, sizes: np.ndarray, batch_size: int, shapes: list, took: float | None
) -> list[str]:
  padded = batch_size * sum(height * width for height, width in shapes)
  real = int(sizes[: batch_size * len(shapes)].prod(axis=1).sum())
  planning = "-" if took is None else f"{took:.2f}"
  return [name, str(len(set(shapes))), f"{padded / real - 1:.1%}", planning]


if __name__ == "__main__":
  main()
