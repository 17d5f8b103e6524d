r"""Input pipeline: images a second, ours beside tf.data as big_vision uses it, in one run.

    python benchmarks/input_pipeline.py [--images=1200] [--quality=90] [--rounds=5]

Both read the same JPEG files (500x375, cut from the photographs of the demos), take an Inception
crop to 224, flip and batch. tf.data decodes only the crop (decode_and_crop_jpeg, as big_vision's
`decode_jpeg_and_inception_crop` does) and samples it without antialiasing; ours is shown with the
crop blurred where it shrinks, and without. They are measured in turns, so that both
see the same machine. The table gives the median of images per second of the clock and of CPU time
(over all threads: what one core does in a second), and their range over the rounds.

tf.data needs TensorFlow in the same Python (pip install -e '.[prepare]'); without it the
table has our rows alone.
"""

import argparse
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import rich.console
import rich.table
from PIL import Image

from vit_jax_zoo.data import images as jpeg
from vit_jax_zoo.data.pipeline import train_batches
from vit_jax_zoo.data.sources import demo as demos
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms

SIZE = 224
BATCH = 64
WARM_UP = 8
"""Batches before the clock starts: buffers fill, TensorFlow tunes itself."""


def write_images(root: pathlib.Path, count: int, quality: int = 90) -> list[str]:
  """Writes photographs of ImageNet's usual size: random parts of the demos', never enlarged.

  (Enlarging would make them smoother, and so faster to decode, than what a camera delivers.)
  """
  rng = np.random.default_rng(0)
  photos = [demos.read_photo(name) for name in demos.PHOTOS]
  photos = [photo for photo in photos if photo.shape[0] >= 375 and photo.shape[1] >= 500]
  files = []
  for i in range(count):
    photo = photos[i % len(photos)]
    height, width = 375, 500
    scale = rng.uniform(max(height / photo.shape[0], width / photo.shape[1]), 1.0)
    size = (max(width, round(photo.shape[1] * scale)), max(height, round(photo.shape[0] * scale)))
    photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    top = rng.integers(photo.shape[0] - height, endpoint=True)
    left = rng.integers(photo.shape[1] - width, endpoint=True)
    file = root / "train" / f"class{i % 10}" / f"{i}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = photo[top : top + height, left : left + width]
    Image.fromarray(part).save(file, "jpeg", quality=quality)
    files.append(str(file))
  return files


def ours(root: pathlib.Path, threads: int, *, antialias: bool) -> Iterator[np.ndarray]:
  """Yields batches as our training gets them: uint8, normalised later on the device."""
  source = load_source(f"folder:{root}", "train")
  crop = dict(name="random_resized_crop", size=SIZE, antialias=antialias)
  transforms = build_transforms([crop, dict(name="random_flip")])
  with train_batches(source, transforms, batch_size=BATCH, seed=0, num_threads=threads) as batches:
    for batch in batches:
      yield batch["image"]


def tf_data(files: list[str], threads: int, *, normalise: bool) -> Iterator[np.ndarray]:
  """Yields batches as big_vision gets them: float32 in [-1, 1], or uint8 when not normalised."""
  tf = importlib.import_module("tensorflow")
  tf.config.set_visible_devices([], "GPU")

  def example(file: "tf.Tensor"):
    data = tf.io.read_file(file)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.image.extract_jpeg_shape(data),
      tf.zeros([0, 0, 4], tf.float32),
      area_range=(0.05, 1.0),
      min_object_covered=0,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.cast(tf.image.resize(image, (SIZE, SIZE)), tf.uint8)
    image = tf.image.random_flip_left_right(image)
    return tf.cast(image, tf.float32) / 127.5 - 1 if normalise else image

  dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  options.deterministic = False
  dataset = dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(2).with_options(options)
  yield from dataset.as_numpy_iterator()


def measure(batches: Iterator[np.ndarray], count: int) -> tuple[float, float]:
  """Returns images per second of the clock, and per second of CPU time over all threads."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(count):
    next(batches)
  images = count * BATCH
  return images / (time.perf_counter() - wall), images / (time.process_time() - cpu)


def contestants(
  root: pathlib.Path, files: list[str], threads: int
) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
  """Returns what is measured, by the name of its row; the first one is what ratios refer to."""
  rows: dict[str, Callable[[], Iterator[np.ndarray]]] = {}
  if importlib.util.find_spec("tensorflow"):
    rows["tf.data, float32"] = lambda: tf_data(files, threads, normalise=True)
    rows["tf.data, uint8"] = lambda: tf_data(files, threads, normalise=False)
  rows["ours, antialiased"] = lambda: ours(root, threads, antialias=True)
  rows["ours, not antialiased"] = lambda: ours(root, threads, antialias=False)
  return rows


def main() -> None:
  """Makes the images, measures in turns, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=1200)
  parser.add_argument("--quality", type=int, default=90)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--threads", type=int, default=2)
  flags = parser.parse_args()
  console = rich.console.Console()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    files = write_images(root, flags.images, flags.quality)
    rows = contestants(root, files, flags.threads)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(flags.rounds):
      for name, start in rows.items():
        # One at a time, from start to end: a pipeline that only waits still works ahead.
        batches = start()
        measure(batches, WARM_UP)
        results[name].append(measure(batches, max(1, flags.images // BATCH)))
        batches.close()
    kilobytes = sum(map(os.path.getsize, files)) / len(files) / 1e3
  decoder = "simplejpeg" if jpeg.simplejpeg else "OpenCV; pip install -e '.[fast]' helps"
  console.print(f"{len(files)} JPEG files, {kilobytes:.0f} kB on average; we decode by {decoder}")
  console.print(table(results, flags.threads))
  if not importlib.util.find_spec("tensorflow"):
    console.print("tf.data was not measured: this Python has no TensorFlow")


def table(results: dict[str, list[tuple[float, float]]], threads: int) -> rich.table.Table:
  """Returns the medians over the rounds, their range, and the ratio to the first row."""
  drawn = rich.table.Table(title=f"Inception crop to {SIZE}, batch {BATCH}, {threads} threads")
  for column in ("pipeline", "images/s", "range", "per CPU second", "range", "ratio (CPU)"):
    drawn.add_column(column, justify="left" if column == "pipeline" else "right")
  base = statistics.median(cpu for _, cpu in next(iter(results.values())))
  for name, rounds in results.items():
    cells = []
    for values in zip(*rounds, strict=True):
      cells += [f"{statistics.median(values):.0f}", f"{min(values):.0f}-{max(values):.0f}"]
    cpu = statistics.median(cpu for _, cpu in rounds)
    drawn.add_row(name, *cells, f"{cpu / base:.2f}")
  return drawn


if __name__ == "__main__":
  main()
