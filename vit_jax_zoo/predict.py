"""Applies a model to images: writes predictions as JSON and annotated images.

    python -m vit_jax_zoo.predict --model=runs/vit_demo --images=a.jpg b.png --output=out/
    python -m vit_jax_zoo.predict --model=ViT-B_16.npz --images='photos/*.jpg' --explain

`--model` is a run (its best checkpoint; `<run>/checkpoints` is the newest one), a published file or
folder, or a published name. Images are files, folders or patterns, of any size and format; or one
video file (`clip.mp4`) or camera (`0`), which gives an annotated video. Prints a line for each
image. Unreadable ones are logged and skipped; the exit status is then 1.
"""

import contextlib
import csv
import glob
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
from absl import flags, logging
from matplotlib.figure import Figure
from PIL import Image

from vit_jax_zoo import cli
from vit_jax_zoo.data.sources.base import CorruptExampleError
from vit_jax_zoo.data.sources.folder import list_images, log_ignored
from vit_jax_zoo.errors import escape_surrogates, one_line
from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.inference import video
from vit_jax_zoo.inference.base import Picture, Predictor, Result, list_options, predict_each
from vit_jax_zoo.inference.coco_json import FILES, CocoFiles, GroundTruth
from vit_jax_zoo.inference.load import predictor
from vit_jax_zoo.inference.progress import track
from vit_jax_zoo.training import disk

FLAGS = flags.FLAGS

_MAX_BYTES = 200  # of a picture's name without suffixes: file names have at most 255
RESULTS, RECORDS = ("predictions.json", "predictions.csv"), "predictions.jsonl"
COLUMNS = ("image", "frame", "label", "score", "left", "top", "right", "bottom", "error")
_UTF_8: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
MARK = ".predict_files"  # lists the files that this command wrote to a folder and may replace
_DEFINE: Any = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def define_flags() -> None:
  """Defines the flags; not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run, or a published file, folder or name")
  flags.DEFINE_multi_string("images", [], "image files, folders or patterns; more may follow")
  flags.DEFINE_string("output", "predictions", "output folder")
  flags.DEFINE_string("class_names", None, "file with one class name per line, in order")
  flags.DEFINE_string("coco_ids", None, "COCO file whose image ids and categories coco*.json have")
  flags.DEFINE_enum("format", "json", ["json", "csv"], "predictions.json or predictions.csv")
  flags.DEFINE_bool("no_figures", False, "write no pictures; much faster")
  flags.DEFINE_integer("batch_size", None, "images at once (default: 8 if classified, else 1)", 1)
  flags.DEFINE_integer("workers", 4, "threads that read images", 1)
  for option in list_options():
    _DEFINE.get(option.type, flags.DEFINE_string)(option.name, option.default, option.help)


def main(argv: Sequence[str]) -> int:
  """Runs the command with further images; returns the process's exit status."""
  if FLAGS.model is None:
    raise ValueError("--model is missing; expected a run's folder, or a published file or name")
  sources = [*FLAGS.images, *argv[1:]]
  videos = [source for source in sources if video.is_video(source)]
  if videos and (len(sources) > 1 or FLAGS.coco_ids):
    raise ValueError(f"--images={videos[0]}: expected no other image, video or --coco_ids")
  paths = [] if videos else find_images(sources)
  options = {o.name: FLAGS[o.name].value for o in list_options() if FLAGS[o.name].present}
  truth = GroundTruth(pathlib.Path(FLAGS.coco_ids), paths) if FLAGS.coco_ids else None
  options |= {"batch_size": FLAGS.batch_size, "class_names": FLAGS.class_names}
  model, output = predictor(FLAGS.model, **options), pathlib.Path(FLAGS.output)
  model.workers = FLAGS.workers
  writing = {"figures": not FLAGS.no_figures, "form": FLAGS.format}
  if videos:
    return predict_video(model, videos[0], output, **writing)
  return predict_all(model, paths, output, truth, **writing)


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
  *,
  figures: bool = True,
  form: str = "json",
) -> int:
  """Predicts for each file and writes `Records`; returns the exit status.

  They have `image`, `pictures` (file names) and the predictor's record, or `error`; with `truth`
  also `image_id`, None if the image is not in it. Detections are also written in COCO's formats,
  panoptic ones with `figures`.
  """
  with Records(output, form, truth) as records:
    pictures, collected = PictureFiles(output), CocoFiles(truth)
    results = zip(paths, predict_each(model, paths), strict=True)
    for path, (image, result) in track(results, "predicting", len(paths), "images"):
      name, stem = escape_surrogates(str(path)), escape_surrogates(path.stem)
      record: dict[str, Any] = {"image": name}
      if truth is not None:
        record["image_id"] = truth.image_ids.get(name)
      if image is not None and isinstance(result, Result):
        prefix, record["pictures"] = pictures.write(stem, result) if figures else (stem, [])
        collected.add(name, prefix, image, result)
      records.add(record, result)
    more = collected.contents()
    return records.finish({k: v for k, v in more.items() if figures or "panoptic" not in k})


def predict_video(
  model: Predictor, source: str, output: pathlib.Path, *, figures: bool = True, form: str = "json"
) -> int:
  """Predicts for each frame of a video file, or of a camera until Ctrl-C; returns the exit status.

  Writes `Records` with `image`, `frame` and the predictor's record, and `figures` as an MP4 file.
  """
  frames, rate, count = video.open_video(source)
  stem = f"camera_{source}" if source.isdecimal() else pathlib.Path(source).stem
  with Records(output, form) as records:
    name = PictureFiles(output).claim(escape_surrogates(stem), [""], ".mp4")[1][""]
    results, writer = enumerate(predict_each(model, frames)), None
    try:
      for number, (frame, result) in track(results, "predicting", count, "frames"):
        if figures and frame is not None and isinstance(result, Result):
          picture = video.annotate(frame, result)
          if writer is None:
            code, size = cv2.VideoWriter.fourcc(*"mp4v"), (picture.shape[1], picture.shape[0])
            writer = cv2.VideoWriter(str(output / name), code, rate, size)
            records.callback(writer.release)
            if not writer.isOpened():
              raise ValueError(f"{output / name}: OpenCV cannot write MP4 here; use --no_figures")
          writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        records.add({"image": escape_surrogates(source), "frame": number}, result)
    except KeyboardInterrupt:
      if not source.isdecimal():
        raise
    return records.finish(unit="frames")


class Records(contextlib.ExitStack):
  """Writes records to `predictions.jsonl`, and either to `predictions.csv`, at once, or to `.json`.

  The table has a row for each object or listed class, best first. ValueError if a file would be
  replaced that this command did not write.
  """

  def __init__(self, output: pathlib.Path, form: str, truth: GroundTruth | None = None) -> None:
    super().__init__()
    output.mkdir(parents=True, exist_ok=True)
    outputs = [output / name for name in (*RESULTS, RECORDS, *FILES)]
    for file in filter(os.path.lexists, outputs):
      if truth is not None and truth.file.resolve() == file.resolve():
        raise ValueError(f"--coco_ids={truth.file}: would be replaced; use another --output")
      if file.name not in _marked(output):
        raise ValueError(f"{file}: not written by this command; use another --output")
    self._output, self._result = output, output / f"predictions.{form}"
    _mark(output, (self._result.name, RECORDS))
    for file in outputs:  # of an earlier run
      file.unlink(missing_ok=True)
    self._count, self._failed, self._table = 0, 0, None
    self._lines = self.enter_context((output / RECORDS).open("w+", buffering=1))
    if form == "csv":
      table = self.enter_context(self._result.open("w", buffering=1, newline="", **_UTF_8))
      self._table = csv.writer(table, lineterminator="\n")
      self._table.writerow(COLUMNS)

  def add(self, record: dict[str, Any], result: Result | ValueError) -> None:
    """Writes a result, and prints its summary; logs an error."""
    name, row = record["image"], [record["image"], record.get("frame", "")]
    self._count += 1
    if isinstance(result, ValueError):
      self._failed += 1
      message = escape_surrogates(" ".join(str(result).split()))
      record = {**record, "error": message}
      has_path = isinstance(result, CorruptExampleError)
      logging.error("%s", message if has_path else f"{name}: {message}")
      rows = [[*row, *[""] * 6, message]]
    else:
      record = {**record, **result.record}
      shown = f"{name} {record['frame']}" if "frame" in record else name
      cli.show(f"{one_line(shown)}  {one_line(result.summary)}")
      boxes = [[""] * 4] * len(result.labels) if result.boxes is None else result.boxes.tolist()
      found = zip(result.labels, result.scores, boxes, strict=True)
      rows = [[*row, label, score, *box, ""] for label, score, box in found] or [row + [""] * 7]
    self._lines.write(json.dumps(record) + "\n")
    if self._table:
      self._table.writerows(rows)

  def finish(self, more: Mapping[str, Any] | None = None, unit: str = "images") -> int:
    """Writes `predictions.json`, and further JSON files by name; returns the exit status."""
    for file, content in (more or {}).items():
      _mark(self._output, [file])
      disk.write_json(self._output / file, content)
    if self._table is None:
      self._lines.seek(0)
      unfinished = self._result.with_suffix(".json.tmp")
      with unfinished.open("w", **_UTF_8) as stream:
        texts = (json.dumps(json.loads(x), indent=1, ensure_ascii=False) for x in self._lines)
        stream.writelines(f"{',' if i else '['}\n{text}" for i, text in enumerate(texts))
        stream.write("\n]\n" if self._count else "[]\n")
      unfinished.replace(self._result)
    done = self._count - self._failed
    logging.info("%d of %d %s done: %s", done, self._count, unit, self._output)
    return 1 if self._failed else 0


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
    prefix, names = self.claim(stem, pictures)
    for suffix, picture in pictures.items():
      pixels = render(picture) if isinstance(picture, Figure) else picture
      Image.fromarray(pixels).save(self._folder / names[suffix])
    return prefix, names

  def claim(
    self, stem: str, suffixes: Iterable[str], ending: str = ".png"
  ) -> tuple[str, dict[str, str]]:
    """Returns a free prefix, and the names by suffix of the files that may be written."""
    while len(os.fsencode(stem)) > _MAX_BYTES:
      stem = stem[:-1]
    prefix, number, suffixes = stem, 1, list(suffixes)
    while True:
      names = {suffix: f"{prefix}{'_' if suffix else ''}{suffix}{ending}" for suffix in suffixes}
      if not self._taken & set(names.values()):
        break
      number += 1
      prefix = f"{stem}_{number}"
    _mark(self._folder, names.values())
    self._taken |= set(names.values())
    return prefix, names


def _mark(folder: pathlib.Path, names: Iterable[str]) -> None:
  with (folder / MARK).open("a", encoding="utf-8") as stream:
    stream.writelines(f"{name}\0" for name in names)


def _marked(folder: pathlib.Path) -> set[str]:
  mark = folder / MARK
  return set(mark.read_text("utf-8", "replace").split("\0")) if mark.is_file() else set()


if __name__ == "__main__":
  old_names = {option.old_name: option.name for option in list_options() if option.old_name}
  cli.run(main, define_flags, renamed={"workdir": "model", **old_names})
