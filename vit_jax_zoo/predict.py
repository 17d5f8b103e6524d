"""Applies a model to images: writes predictions as JSON and annotated images.

    python -m vit_jax_zoo.predict --model=runs/vit_demo --images=a.jpg b.png --output=out/
    python -m vit_jax_zoo.predict --model=ViT-B_16.npz --images='photos/*.jpg' --explain

`--model` is a run (its best checkpoint; `<run>/checkpoints` is the newest one), a published file or
folder, or a published name. Images are files, folders or patterns, of any size and format.
Unreadable ones are logged and skipped; the exit status is then 1.
"""

import datetime
import glob
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags, logging
from matplotlib.figure import Figure
from PIL import Image

from vit_jax_zoo import cli
from vit_jax_zoo.data.sources.base import CorruptExampleError
from vit_jax_zoo.data.sources.folder import list_images, log_ignored, read_class_names
from vit_jax_zoo.errors import escape_surrogates
from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.inference.base import Picture, Predictor, Result, list_options, predict_each
from vit_jax_zoo.inference.coco_json import FILES, CocoFiles, GroundTruth
from vit_jax_zoo.inference.load import predictor
from vit_jax_zoo.training import atomic_write

FLAGS = flags.FLAGS

EXIT_SOME_FAILED = 1

_MAX_BYTES = 200  # of a picture's name without suffixes: file names have at most 255
RESULTS, RECORDS = "predictions.json", "predictions.jsonl"
MARK = ".predict_files"  # lists the files that this command wrote to a folder and may replace
_DEFINE: Any = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def define_flags() -> None:
  """Defines the flags; not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run, or a published file, folder or name")
  flags.DEFINE_multi_string("images", [], "image files, folders or patterns; more may follow")
  flags.DEFINE_string("output", "predictions", "output folder")
  flags.DEFINE_string("class_names", None, "file with one class name per line, in order")
  flags.DEFINE_string("coco_ids", None, "COCO file whose image ids and categories coco*.json have")
  for option in list_options():
    _DEFINE.get(option.type, flags.DEFINE_string)(option.name, option.default, option.help)


def main(argv: Sequence[str]) -> int:
  """Runs the command with further images; returns the process's exit status."""
  if FLAGS.model is None:
    raise ValueError("--model is missing; expected a run's folder, or a published file or name")
  paths = find_images([*FLAGS.images, *argv[1:]])
  given = [option for option in list_options() if FLAGS[option.name].present]
  options = {option.name: FLAGS[option.name].value for option in given}
  truth = GroundTruth(pathlib.Path(FLAGS.coco_ids), paths) if FLAGS.coco_ids else None
  names = read_class_names(FLAGS.class_names)
  found = predictor(FLAGS.model, class_names=names, **options)
  return predict_all(found, paths, pathlib.Path(FLAGS.output), truth)


def find_images(given: Sequence[str]) -> list[pathlib.Path]:
  """Returns the files of paths, folders and patterns, each once, in order."""
  found: dict[pathlib.Path, None] = {}
  for text in given:
    path = pathlib.Path(text)
    if path.is_dir():
      images, ignored = list_images(path)
      log_ignored(path, ignored)
      files = [path / name for name in images]
    else:
      matches = [path] if path.exists() else sorted(map(pathlib.Path, glob.glob(text)))
      files = [match for match in matches if match.is_file()]
    if not files:
      raise FileNotFoundError(f"--images={text}: no image file there")
    found |= dict.fromkeys(files)
  if not found:
    raise ValueError("--images: missing; expected files, folders or patterns in quotes")
  return list(found)


def predict_all(
  model: Predictor,
  paths: Sequence[pathlib.Path],
  output: pathlib.Path,
  truth: GroundTruth | None = None,
) -> int:
  """Predicts for each file and writes the results; returns the exit status.

  `predictions.json` has an entry for each file, in order, `predictions.jsonl` a line, written
  immediately: `image`, `pictures` (file names) and the predictor's record, or `error`; with `truth`
  also `image_id`, None if the image is not in it. Detections are also written in COCO's formats.
  ValueError if an existing file would be replaced that this command did not write.
  """
  output.mkdir(parents=True, exist_ok=True)
  _check_outputs(output, truth)
  _mark(output, (RESULTS, RECORDS))
  pictures, collected = PictureFiles(output), CocoFiles(truth)
  records: list[dict[str, Any]] = []
  failed, begin = 0, time.monotonic()
  lines = output / RECORDS
  lines.unlink(missing_ok=True)
  results = predict_each(model, paths)
  for done, (path, (image, result)) in enumerate(zip(paths, results, strict=True), start=1):
    name = escape_surrogates(str(path))
    base: dict[str, Any] = {"image": name}
    if truth is not None:
      base["image_id"] = truth.image_ids.get(name)
    if image is None or isinstance(result, ValueError):
      failed += 1
      message = escape_surrogates(" ".join(str(result).split()))
      record = {**base, "error": message}
      has_path = isinstance(result, CorruptExampleError)
      logging.error("%s", message if has_path else f"{name}: {message}")
    else:
      prefix, files = pictures.write(escape_surrogates(path.stem), result)
      record = {**base, "pictures": files, **result.record}
      collected.add(name, prefix, image, result)
    records.append(record)
    with lines.open("a") as stream:
      stream.write(json.dumps(record) + "\n")
    left = round((time.monotonic() - begin) / done * (len(paths) - done))
    logging.info("%d/%d images, ETA %s", done, len(paths), datetime.timedelta(seconds=left))
  for file, content in {RESULTS: records, **collected.contents()}.items():
    _mark(output, [file])
    atomic_write.write_json(output / file, content)
  logging.info("%d of %d images done: %s", len(paths) - failed, len(paths), output)
  return EXIT_SOME_FAILED if failed else 0


class PictureFiles:
  """Writes pictures under free names; those of earlier runs are free."""

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder = folder
    self._taken = {path.name for path in folder.iterdir()} - _marked(folder)
    self._model_pictures: dict[str, str] = {}

  def write(self, stem: str, result: Result) -> tuple[str, list[str]]:
    """Writes an image's pictures; returns the prefix of their names (`stem_2`), and the names."""
    written, (own, of_model) = self._model_pictures, ({}, {})
    for name, picture in result.pictures.items():
      (of_model if name.startswith("model_") else own)[name.removeprefix("model_")] = picture
    if new := {k: picture for k, picture in of_model.items() if k not in written}:
      written |= self._write("model", new)[1]
    prefix, names = self._write(stem, own)
    return prefix, [*names.values(), *(written[k] for k in of_model)]

  def _write(self, stem: str, pictures: Mapping[str, Picture]) -> tuple[str, dict[str, str]]:
    while len(os.fsencode(stem)) > _MAX_BYTES:
      stem = stem[:-1]
    prefix, number = stem, 1
    while self._taken & set((names := _names(prefix, pictures)).values()):
      number += 1
      prefix = f"{stem}_{number}"
    _mark(self._folder, names.values())
    for suffix, picture in pictures.items():
      pixels = render(picture) if isinstance(picture, Figure) else picture
      Image.fromarray(pixels).save(self._folder / names[suffix])
    self._taken |= set(names.values())
    return prefix, names


def _names(prefix: str, suffixes: Iterable[str]) -> dict[str, str]:
  return {suffix: f"{prefix}{'_' if suffix else ''}{suffix}.png" for suffix in suffixes}


def _check_outputs(folder: pathlib.Path, truth: GroundTruth | None) -> None:
  for file in filter(os.path.lexists, (folder / name for name in (RESULTS, RECORDS, *FILES))):
    if truth is not None and truth.file.resolve() == file.resolve():
      raise ValueError(f"--coco_ids={truth.file}: would be replaced; use another --output")
    if file.name not in _marked(folder):
      raise ValueError(f"{file}: not written by this command; use another --output")


def _mark(folder: pathlib.Path, names: Iterable[str]) -> None:
  with (folder / MARK).open("a", encoding="utf-8") as stream:
    stream.writelines(f"{name}\0" for name in names)


def _marked(folder: pathlib.Path) -> set[str]:
  mark = folder / MARK
  return set(mark.read_text("utf-8", "replace").split("\0")) if mark.is_file() else set()


if __name__ == "__main__":
  old_names = {option.old_name: option.name for option in list_options() if option.old_name}
  cli.run(main, define_flags, renamed={"workdir": "model", **old_names})
