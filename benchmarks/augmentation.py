r"""Augmentations: what they cost, and what they look like.

    python benchmarks/augmentation.py [--picture=augmented.png] [--rounds=5] [--images=256]
    python benchmarks/augmentation.py --config=configs/vit.py:b16_augreg --picture=augmented.png

The table: images a second of CPU time, on one core, through an Inception crop from JPEG files of
500x375 to 224 pixels and a flip, without and with each policy (medians over the rounds, in turns;
the ratio is that of the medians). The picture: a row for each of some photographs, through the same
transforms, or through those of `--config`, again and again; the first column is the photograph.
What mixes examples is not in it: a run draws its first batch, mixed, when it begins.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import cv2
import numpy as np
import rich.console
import rich.table
from input_pipeline import write_images

from vit_jax_zoo import config as configs
from vit_jax_zoo.data.sources.base import Example
from vit_jax_zoo.data.sources.demo import read_photo
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.systems.igpt.figures import draw_images

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


def table(images: list[bytes], rounds: int) -> rich.table.Table:
  """Measures all policies in turns."""
  rates: dict[str, list[float]] = {name: [] for name in POLICIES}
  for seed in range(rounds):
    for name, policy in POLICIES.items():
      rates[name].append(measure(BASE + policy, images, seed))
  drawn = rich.table.Table(title=f"{len(images)} images, {rounds} rounds")
  for column in ("transforms", "images / CPU second", "range", "ratio"):
    drawn.add_column(column, justify="left" if column == "transforms" else "right")
  base = statistics.median(rates["crop and flip"])
  for name, values in rates.items():
    median = statistics.median(values)
    span = f"{min(values):.0f}-{max(values):.0f}"
    drawn.add_row(name, f"{median:.0f}", span, f"{median / base:.2f}")
  return drawn


def picture(specs: list[dict], path: str, title: str) -> None:
  """Draws photographs as they are, and as transforms make them."""
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
  images = np.stack(rows)
  figure = draw_images(images, title=title, columns=COLUMNS)
  figure.savefig(path)


def main() -> None:
  """Prints the table, unless a config's picture is all that is wanted; draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", help="draw this config's training transforms, measure nothing")
  parser.add_argument("--picture", help="file to draw to, such as augmented.png")
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args()
  specs, title = BASE + POLICIES["+ RandAugment(2, 10)"], "RandAugment(2, 10)"
  if flags.config:
    transforms = configs.load(flags.config).data.train.transforms
    specs, title = [dict(spec) for spec in transforms], flags.config
  else:
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
      files = write_images(pathlib.Path(folder), flags.images)
      images = [pathlib.Path(file).read_bytes() for file in files]
    rich.console.Console().print(table(images, flags.rounds))
  if flags.picture:
    picture(specs, flags.picture, title)


if __name__ == "__main__":
  main()
