"""Semantic segmentation from your own images: a label map, a PNG file of class ids, for each.

A label PNG has one channel, or a palette, with a class id at each pixel; `load_label_map` sets
which ids are ignored, and their offset.
"""

import functools
import itertools
import os
import pathlib
import re
from typing import NamedTuple

from vit_jax_zoo.data.sources import base
from vit_jax_zoo.data.sources.folder import ClassNames, FileSource, list_images, read_class_names


class Layout(NamedTuple):
  """Patterns of paths; `{name}.*` stands for any image suffix, a name may have several folders."""

  images: str
  labels: str  # label PNGs
  lists: str | None = None  # text files with the names of a split; None where splits are folders


LAYOUTS = (
  Layout(
    "leftImg8bit/{split}/{name}_leftImg8bit.*", "gtFine/{split}/{name}_gtFine_labelTrainIds.png"
  ),
  Layout(
    "JPEGImages/{name}.*", "SegmentationClass/{name}.png", "ImageSets/Segmentation/{split}.txt"
  ),
  Layout("images/{split}/{name}.*", "annotations/{split}/{name}.png"),
  Layout("images/{split}/{name}.*", "labels/{split}/{name}.png"),
)
"""Cityscapes, Pascal VOC, ADE20K and own images."""

SPLIT_NAMES = {"training": "train", "testing": "test"}


class SegmentationSource(FileSource):
  """Image files with label maps, both as bytes."""

  def example_name(self, index: int) -> str:
    return f"{super().example_name(index)} with label map {self._files[index][1]}"

  def __getitem__(self, index: int) -> base.Example:
    image, label_map = map(self.read, self._files[index])
    return {"image": image, "label_map": label_map, "image_id": index}


def open_splits(
  location: str,
  images: str | None = None,  # pattern; default: one of `LAYOUTS`
  labels: str | None = None,  # pattern of the label maps; given together with `images`
  lists: str | None = None,  # pattern of files of names, for patterns without `{split}`
  class_names: ClassNames = None,
) -> base.Splits:
  """Finds the images below a local folder and their label maps.

  FileNotFoundError without the folder or a label map; ValueError without images, or for a pattern
  without `{name}` or `{split}`.
  """
  expected = "images/<split>/, annotations/<split>/ (demo:scenes, panoptic=True, needs no files)"
  root = base.local_folder("segmentation", location, expected)
  layout = _choose_layout(root, images, labels, lists)
  names = read_class_names(class_names)
  whole = base.DatasetInfo(f"segmentation:{location}", 0, len(names) or None, names)
  found = _find_by_lists(root, layout) if layout.lists else _find_in_folders(root, layout)
  if not found:
    listed = f" listed in {layout.lists}" if layout.lists else ""
    raise ValueError(f"{root}: no images{listed}; expected {layout.images}")
  for alias, name in SPLIT_NAMES.items():
    if alias in found and name in found:
      raise ValueError(f"{root}: {alias} and {name} are both the split {name!r}; keep one")
  _check_labels(root, found)
  opened = functools.partial(SegmentationSource, whole, root)
  splits = {SPLIT_NAMES.get(s, s): sorted(files) for s, files in found.items()}
  return base.name_validation({s: functools.partial(opened, f) for s, f in splits.items()})


def _choose_layout(
  root: pathlib.Path, images: str | None, labels: str | None, lists: str | None
) -> Layout:
  if (images is None) != (labels is None):
    raise ValueError("segmentation: give both patterns, images and labels, or neither")
  if images is not None and labels is not None:
    needed = ("{name}",) if lists else ("{name}", "{split}")
    for pattern, part in itertools.product((images, labels), needed):
      if part not in pattern:
        raise ValueError(f"segmentation: the pattern {pattern!r} lacks {part}")
    return Layout(images, labels, lists)
  for layout in LAYOUTS:
    if all((root / pattern.split("/")[0]).is_dir() for pattern in (layout.images, layout.labels)):
      return layout
  known = " or ".join(sorted({layout.images for layout in LAYOUTS}))
  raise ValueError(f"{root}: unknown layout; expected {known}, or the options images and labels")


def _find_in_folders(root: pathlib.Path, layout: Layout) -> dict[str, list[tuple[str, str]]]:
  pattern = re.escape(layout.images).replace(r"\{split\}", r"(?P<split>[^/]+)", 1)
  pattern = pattern.replace(r"\{split\}", r"(?P=split)").replace(r"\{name\}", r"(?P<name>.+)", 1)
  pattern = pattern.replace(r"\{name\}", r"(?P=name)").replace(r"\.\*", r"\.\w+")
  found: dict[str, list[tuple[str, str]]] = {}
  for file in _images_below(root, layout.images):
    if match := re.fullmatch(pattern, file):
      labels = layout.labels.format(split=match["split"], name=match["name"])
      found.setdefault(match["split"], []).append((file, labels))
  return found


def _find_by_lists(root: pathlib.Path, layout: Layout) -> dict[str, list[tuple[str, str]]]:
  lists = str(layout.lists)
  pattern = re.escape(lists).replace(r"\{split\}", "(.+)")
  below, stem = _images_below(root, layout.images), layout.images.removesuffix(".*")
  images = {base.composed(os.path.splitext(file)[0]): file for file in below}
  found = {}
  for file in filter(os.path.isfile, sorted(root.glob(lists.replace("{split}", "*")))):
    split = re.fullmatch(pattern, file.relative_to(root).as_posix())
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # as in file names
    names = [line.split()[0] for line in text.splitlines() if line.strip()]
    stems = [base.composed(stem.format(split="", name=name)) for name in names]
    missing = [stem for stem in stems if stem not in images]
    if missing:
      raise FileNotFoundError(f"{file}: image {missing[0]!r} is missing ({len(missing)} in all)")
    pairs = zip(names, stems, strict=True)
    found[split[1] if split else file.stem] = [
      (images[stem], layout.labels.format(split="", name=name)) for name, stem in pairs
    ]
  return found


def _images_below(root: pathlib.Path, pattern: str) -> list[str]:
  folder = root / pattern.split("{")[0].rpartition("/")[0]
  if not folder.is_dir():
    return []
  files = [(folder / path).relative_to(root).as_posix() for path in list_images(folder)[0]]
  for file, after in itertools.pairwise(sorted(files)) if pattern.endswith(".*") else ():
    if os.path.splitext(file)[0] == os.path.splitext(after)[0]:
      raise ValueError(f"{root}: {file} and {after} have one label map; keep one")
  return files


def _check_labels(root: pathlib.Path, found: dict[str, list[tuple[str, str]]]) -> None:
  for split, files in found.items():
    missing = [pair for pair in files if not os.path.isfile(base.file_path(str(root), pair[1]))]
    if missing and SPLIT_NAMES.get(split, split) != "test":  # benchmarks do not publish these
      image, labels = missing[0]
      raise FileNotFoundError(
        f"{root / image} has no label map {root / labels} ({len(missing)} of {len(files)} of the "
        f"split {split!r} have none)"
      )
