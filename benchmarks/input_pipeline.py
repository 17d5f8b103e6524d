r"""Input pipeline: images per second compared with tf.data as big_vision uses it.

    python benchmarks/input_pipeline.py [--images=1200] [--quality=90] [--rounds=5]

Both read the same JPEG files (500x375, crops of the demo photographs), take an Inception crop to
224, flip and batch. tf.data decodes only the crop, as in big_vision's
`decode_jpeg_and_inception_crop`, and resizes it without antialiasing; this package is measured with
and without. The pipelines run alternately. The table has the median and range of images per second
of wall and of CPU time.

tf.data requires TensorFlow (`pip install -e '.[prepare]'`); without it, the rows are omitted.
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
import timing
from PIL import Image

from vit_jax_zoo.data import images as jpeg
from vit_jax_zoo.data.pipeline import train_batches
from vit_jax_zoo.data.sources import demo as demos
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms

SIZE = 224
BATCH = 64
WARM_UP = 8
"""Batches before timing starts, while buffers fill and TensorFlow tunes itself."""


def write_images(root: pathlib.Path, count: int, quality: int = 90) -> list[str]:
  """Writes random crops of the demo photographs in ImageNet's usual size and returns their paths.

  They are never enlarged, which would make them smoother and so faster to decode than real ones.
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
  """Yields this package's batches: uint8, normalized later on the device."""
  source = load_source(f"folder:{root}", "train")
  crop = dict(name="random_resized_crop", size=SIZE, antialias=antialias)
  transforms = build_transforms([crop, dict(name="random_flip")])
  with train_batches(source, transforms, batch_size=BATCH, seed=0, num_threads=threads) as batches:
    for batch in batches:
      yield batch["image"]


def tf_data(files: list[str], threads: int, *, normalize: bool) -> Iterator[np.ndarray]:
  """Yields big_vision's batches: float32 in [-1, 1], or uint8 if not normalized."""
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
    return tf.cast(image, tf.float32) / 127.5 - 1 if normalize else image

  dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  options.deterministic = False
  dataset = dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(2).with_options(options)
  yield from dataset.as_numpy_iterator()


def measure(batches: Iterator[np.ndarray], count: int) -> tuple[float, float]:
  """Returns images per second of wall time, and of CPU time over all threads."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(count):
    next(batches)
  images = count * BATCH
  return images / (time.perf_counter() - wall), images / (time.process_time() - cpu)


def pipelines(
  root: pathlib.Path, files: list[str], threads: int
) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
  """Returns the pipelines by name; ratios refer to the first."""
  rows: dict[str, Callable[[], Iterator[np.ndarray]]] = {}
  if importlib.util.find_spec("tensorflow"):
    rows["tf.data, float32"] = lambda: tf_data(files, threads, normalize=True)
    rows["tf.data, uint8"] = lambda: tf_data(files, threads, normalize=False)
  rows["ours, antialiased"] = lambda: ours(root, threads, antialias=True)
  rows["ours, not antialiased"] = lambda: ours(root, threads, antialias=False)
  return rows


def main() -> None:
  """Writes the images, measures the pipelines alternately and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=1200)
  parser.add_argument("--quality", type=int, default=90)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--threads", type=int, default=2)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    files = write_images(root, flags.images, flags.quality)
    rows = pipelines(root, files, flags.threads)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(flags.rounds):
      for name, start in rows.items():
        # One at a time, from start to end: an idle pipeline would prefetch.
        batches = start()
        measure(batches, WARM_UP)
        results[name].append(measure(batches, max(1, flags.images // BATCH)))
        batches.close()
    kilobytes = sum(map(os.path.getsize, files)) / len(files) / 1e3
  decoder = "simplejpeg" if jpeg.simplejpeg else "OpenCV; faster: pip install -e '.[fast]'"
  print(f"{len(files)} JPEG files, {kilobytes:.0f} kB on average; decoder: {decoder}")
  print(f"Inception crop to {SIZE}, batch {BATCH}, {flags.threads} threads; {timing.machine()}\n")
  print(table(results))
  if not importlib.util.find_spec("tensorflow"):
    print("\ntf.data was not measured: TensorFlow is not installed")


def table(results: dict[str, list[tuple[float, float]]]) -> str:
  """Returns medians and ranges over the rounds, and the ratio to the first row."""
  base = statistics.median(cpu for _, cpu in next(iter(results.values())))
  rows = []
  for name, rounds in results.items():
    wall, cpu = zip(*rounds, strict=True)
    cells = [timing.spread(values, ".0f") for values in (wall, cpu)]
    rows.append([name, *cells, f"{statistics.median(cpu) / base:.2f}"])
  return timing.markdown(("pipeline", "images/s", "images/CPU s", "ratio (CPU)"), rows)


if __name__ == "__main__":
  main()
