r"""Time of `predict --no_figures` over that of its compiled model; the target is below 1.1.

    python benchmarks/predict_speed.py
    python benchmarks/predict_speed.py --images=64 --rounds=3 --batch_size=16 --image_size=384

JPEG files, cut out of the demo photographs, and a ViT of random weights. In turns:

* bare: the compiled model on batches that lie ready, with a wait after each;
* predict: files to `predictions.json`, lines on a terminal (discarded) and JSON lines included.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import timing
from PIL import Image
from skimage import data

from vit_jax_zoo import create_model, predict
from vit_jax_zoo.inference.base import Options, Trained, create_predictor
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.weights import Preprocess


def write_images(folder: pathlib.Path, count: int, side: int) -> list[pathlib.Path]:
  """Writes random square crops of photographs as JPEG files."""
  rng, photos = np.random.default_rng(0), [data.astronaut(), data.chelsea(), data.coffee()]
  paths = [folder / f"{i:04}.jpg" for i in range(count)]
  for i, path in enumerate(paths):
    photo = photos[i % len(photos)]
    top, left = (rng.integers(0, length - side) for length in photo.shape[:2])
    Image.fromarray(photo[top : top + side, left : left + side]).save(path, quality=90)
  return paths


def make_predictor(name: str, batch_size: int, side: int) -> Any:
  """Returns the predictor of a classifier with random weights."""
  model = create_model(name, num_classes=1000)
  task = create_task("classification", model, num_classes=1000)
  batch = {"image": jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)}
  shapes, rng = jax.eval_shape(task.init, jax.random.key(0), batch), np.random.default_rng(0)
  variables = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, x.dtype), shapes)
  preprocess = Preprocess((side, side), 0.5, 0.5, "crop", "bicubic", 0.9)
  prepare = lambda image: {"image": preprocess.resize(image)}  # noqa: E731
  predictor = create_predictor(
    Trained("random", task, variables, prepare, (side, side), name), Options()
  )
  predictor.batch_size = batch_size
  return predictor


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="vit_s16")
  parser.add_argument("--images", type=int, default=500)
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--workers", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=3)
  flags = parser.parse_args()
  predictor = make_predictor(flags.model, flags.batch_size, flags.image_size)
  predictor.workers = flags.workers
  with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
    folder = pathlib.Path(name)
    paths = write_images(folder, flags.images, flags.image_size)
    first = [predictor.prepare(np.asarray(Image.open(p)))["image"] for p in paths]
    batches = np.array_split(np.stack(first), range(flags.batch_size, len(paths), flags.batch_size))
    compiled, variables = predictor._logits, predictor._trained.variables
    run = functools.partial(predict.predict_all, predictor, paths, folder)

    def bare(count: int) -> None:
      for _ in range(count):
        for batch in batches:
          np.asarray(compiled(variables, batch))

    def whole(count: int) -> None:
      for _ in range(count):
        with contextlib.redirect_stdout(nowhere):
          run(figures=False)

    times = timing.alternate({"bare": bare, "predict": whole}, rounds=flags.rounds, seconds=0.01)
  count = len(paths)
  rows = [
    [
      title,
      timing.spread([count / getattr(x, kind) for x in times["bare"]]),
      timing.spread([count / getattr(x, kind) for x in times["predict"]]),
      timing.spread(
        [
          getattr(ours, kind) / getattr(peer, kind)
          for ours, peer in zip(times["predict"], times["bare"], strict=True)
        ]
      ),
    ]
    for title, kind in (("wall time", "wall"), ("CPU time", "cpu"))
  ]
  print(timing.markdown(["", "bare, images/s", "predict, images/s", "predict / bare"], rows))
  print(f"\n{flags.model}, {count} images; median (range) of {flags.rounds}; {timing.machine()}")


if __name__ == "__main__":
  main()
