r"""Augmentations: throughput, and a figure of their results.

    python benchmarks/augmentation.py [--picture=augmented.png] [--rounds=5] [--images=256]
    python benchmarks/augmentation.py --config=configs/vit.py:b16_augreg --picture=augmented.png

The table has images per CPU second on one core, from JPEG files of 500x375 through an Inception
crop to 224 pixels and a flip, without and with each policy, measured alternately. The figure has
one row per photograph: the original, then results of the same transforms or of those of `--config`.
Mixup and CutMix are not included; a run draws its first batch with them.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import cv2
import numpy as np
import timing
from input_pipeline import write_images
from matplotlib.figure import Figure

from vit_jax_zoo import config as config_lib
from vit_jax_zoo.data.sources.base import Example
from vit_jax_zoo.data.sources.demo import read_photo
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.figures.attention import draw_mosaic

SIZE = 224
PHOTOS = ("cat", "temple", "flower", "astronaut")
COLUMNS = 8

BASE = [{"name": "random_resized_crop", "size": SIZE}, {"name": "random_flip"}]
POLICIES = {
  "crop and flip": [],
  "+ RandAugment(2, 10)": [{"name": "rand_augment", "magnitude": 10}],
  "+ RandAugment(2, 15)": [{"name": "rand_augment", "magnitude": 15}],
  "+ rand-m9-mstd0.5-inc1": [{"name": "timm_rand_augment"}],
  "+ random erasing": [{"name": "random_erasing"}],
}


def measure(specs: list[dict], images: list[bytes], seed: int) -> float:
  """Returns images per second of CPU time."""
  transforms, rng = build_transforms(specs), np.random.default_rng(seed)
  start = time.process_time()
  for data in images:
    example: Example = {"image": data}
    for transform in transforms:
      example = transform(example, rng)
  return len(images) / (time.process_time() - start)


def table(images: list[bytes], rounds: int) -> str:
  """Measures all policies alternately and returns the table."""
  rates: dict[str, list[float]] = {name: [] for name in POLICIES}
  for seed in range(rounds):
    for name, policy in POLICIES.items():
      rates[name].append(measure(BASE + policy, images, seed))
  base = statistics.median(rates["crop and flip"])
  rows = [
    [name, timing.spread(values, ".0f"), f"{statistics.median(values) / base:.2f}"]
    for name, values in rates.items()
  ]
  return timing.markdown(("transforms", "images/CPU s", "ratio"), rows)


def picture(specs: list[dict], path: str, title: str) -> None:
  """Draws photographs and their augmentations."""
  transforms, rng, rows = build_transforms(specs), np.random.default_rng(0), []
  for name in PHOTOS:
    photo = read_photo(name)
    side = min(photo.shape[:2])
    square = np.ascontiguousarray(photo[:side, :side])
    rows.append(cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    for _ in range(COLUMNS - 1):
      example: Example = {"image": photo, "label": 0}
      for transform in transforms:
        example = transform(example, rng)
      image = np.clip(np.rint(example["image"]), 0, 255).astype(np.uint8)
      rows.append(cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
  figure = Figure(figsize=(10.5, 5.8), dpi=110, layout="constrained")
  ax = figure.subplots()
  draw_mosaic(ax, np.stack(rows).reshape(len(PHOTOS), COLUMNS, SIZE, SIZE, 3) / 255)
  ax.set_title(title, loc="left", weight="bold")
  figure.savefig(path)


def main() -> None:
  """Prints the table, or with --config only draws the figure."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", help="draw this config's training transforms, without the table")
  parser.add_argument("--picture", help="file of the figure, such as augmented.png")
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args()
  specs, title = BASE + POLICIES["+ RandAugment(2, 10)"], "RandAugment(2, 10)"
  if flags.config:
    transforms = config_lib.load(flags.config).data.train.transforms
    specs, title = [dict(spec) for spec in transforms], flags.config
  else:
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
      files = write_images(pathlib.Path(folder), flags.images)
      images = [pathlib.Path(file).read_bytes() for file in files]
    print(f"{len(images)} images, {flags.rounds} rounds; {timing.machine()}\n")
    print(table(images, flags.rounds))
  if flags.picture:
    picture(specs, flags.picture, title)


if __name__ == "__main__":
  main()
