"""Images with references for super-resolution: own pairs, and the published datasets.

docs/guides/super_resolution.md shows the layouts. The reference of an image is the file, or the
folder of files, of its full name, else of its name without suffix. Two of them, and one of two
images, are refused. Names are compared after Unicode normalisation (NFC). The published test sets
have only the split `test`.
"""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from absl import logging

from vit_jax_zoo.data.images import suffixes
from vit_jax_zoo.data.sources import base
from vit_jax_zoo.data.sources.base import composed
from vit_jax_zoo.data.sources.folder import TEST_FRACTION, FileSource, hash_name, hold_out
from vit_jax_zoo.errors import check_names

REFERENCES = ("1", "2", "3", "4", "5", "random", "all", "self")
"""Values of the option `reference`: docs/guides/super_resolution.md."""

Pairs: TypeAlias = Mapping[pathlib.Path, tuple[pathlib.Path, ...]]
"""References of each image, in order."""

_CUFED5 = "test/CUFED5"
_SUN80, _SUN80_REFERENCES = "Sun_Hays_SR_groundtruth", "Sun_Hays_SR_scenematches"
_URBAN100 = "image_SRF_4"


class PairSource(FileSource):
  """Examples: `image`, bytes; `reference`, bytes, a tuple of them for "all", None for "self"."""

  stitched = False

  def __getitem__(self, index: int) -> base.Example:
    image, references = self._files[index]
    found = tuple(map(self.read, references))
    reference = found if self.stitched else next(iter(found), None)
    return {"image": self.read(image), "reference": reference}


def open_splits(location: str, reference: str | int = "1") -> base.Splits:
  """Opens the splits of a local folder in one of the layouts above, with one of `REFERENCES`.

  FileNotFoundError without the folder or a reference; ValueError for an unknown `reference` or
  layout, or ambiguous names.
  """
  reference = str(reference)
  check_names("reference", [reference], REFERENCES)
  expected = "input/ and ref/, or a published dataset (demo:stereo needs no files)"
  root = base.local_folder("pairs", location, expected)
  opened, found = functools.partial(_open, f"pairs:{location}", reference), _find_layout(root)
  return base.name_validation({s: functools.partial(opened, find) for s, find in found.items()})


def _open(name: str, reference: str, find: Callable[[], Pairs]) -> PairSource:
  chosen = {image: _choose(image, refs, reference) for image, refs in find().items()}
  pairs = [(str(image), tuple(map(str, refs))) for image, refs in chosen.items()]
  source = PairSource(base.DatasetInfo(name, len(pairs)), "", pairs)
  source.stitched = reference == "all"
  return source


def _choose(
  image: pathlib.Path, references: tuple[pathlib.Path, ...], reference: str
) -> tuple[pathlib.Path, ...]:
  if reference == "self":
    return ()
  if not references:
    raise FileNotFoundError(f"{image}: no reference of its name; add one, or set reference='self'")
  if reference == "all":
    return references
  first = hash_name(composed(image.name)) % len(references)
  number = first if reference == "random" else int(reference) - 1
  if number >= len(references):
    last = f"it has {len(references)}, the last is {references[-1]}"
    raise FileNotFoundError(f"{image}: no reference number {reference}; {last}")
  return (references[number],)


def _find_layout(root: pathlib.Path) -> dict[str, Callable[[], Pairs]]:
  found: dict[str, Callable[[], Pairs]] = {
    split: functools.partial(_named_alike, root / split / "input", root / split / "ref")
    for split in ("train", "test", *base.VALIDATION_NAMES)
    if (root / split / "input").is_dir()
  }
  for folder in (root / _CUFED5, root):
    if "test" not in found and folder.is_dir() and any(folder.glob("*_0.png")):
      found["test"] = functools.partial(_cufed5, folder)
  if found:
    return found
  if (root / "input").is_dir():
    whole = functools.cache(functools.partial(_named_alike, root / "input", root / "ref"))
    parts = {"train": False, "test": True}
    return {"all": whole} | {k: functools.partial(_hashed, whole, v) for k, v in parts.items()}
  if (root / _SUN80).is_dir():
    return {"test": functools.partial(_named_alike, root / _SUN80, root / _SUN80_REFERENCES)}
  if (root / _URBAN100).is_dir():
    return {"test": functools.partial(_without_references, root / _URBAN100, "*_HR.png")}
  if _images(root):
    return {"test": functools.partial(_without_references, root, "*")}
  raise ValueError(
    f"pairs:{root}: unknown layout; expected input/ and ref/, train/input and train/ref, "
    f"{_CUFED5}, {_SUN80}, {_URBAN100}, or images"
  )


def _named_alike(inputs: pathlib.Path, references: pathlib.Path) -> Pairs:
  """Pairs images with the file of their name, or with the files of the folder of their name."""
  images = _images(inputs)
  if not images:
    raise ValueError(f"{inputs}: no images of {', '.join(sorted(suffixes()))}")
  files: dict[str, list[pathlib.Path]] = {}
  for path in [*_images(references), *(path for path in _listing(references) if path.is_dir())]:
    for name in {composed(path.name), composed(path.stem) if path.is_file() else ""} - {""}:
      files.setdefault(name, []).append(path)
  names = {composed(image.name) for image in images}
  pairs = {image: _references_of(image, files, names) for image in images}
  first: dict[tuple[pathlib.Path, ...], pathlib.Path] = {}
  for image, found in pairs.items():
    if found and first.setdefault(found, image) != image:
      both = f"{first[found]}, {image}"
      raise ValueError(f"{both}: one reference, {found[0]}; expected {references / image.name}")
  used = {path for found in first for path in found}
  if unused := set(itertools.chain(*files.values())) - used - {path.parent for path in used}:
    text = "%s: %d references without an image of their name, not used: %s"
    logging.warning(text, references, len(unused), min(unused).name)
  return pairs


def _references_of(
  image: pathlib.Path, files: Mapping[str, list[pathlib.Path]], names: set[str]
) -> tuple[pathlib.Path, ...]:
  """Returns an image's references: of its full name; else of its stem, unless of another image."""
  found = files.get(composed(image.name), [])
  others = [path for path in files.get(composed(image.stem), []) if path not in found]
  found = found + [p for p in others if p.is_dir() or not (found or composed(p.name) in names)]
  if len(found) > 1:
    listed = ", ".join(map(str, sorted(found)))
    raise ValueError(f"{image}: several references have its name, {listed}; keep one of them")
  return tuple(_images(found[0])) if found and found[0].is_dir() else tuple(found)


def _cufed5(folder: pathlib.Path) -> Pairs:
  pairs = {}
  for image in sorted(folder.glob("*_0.png")):
    references = tuple(folder / f"{image.name[:-5]}{level}.png" for level in range(1, 6))
    for path in references:
      if not path.is_file():
        raise FileNotFoundError(f"{image}: no reference {path.name}; CUFED5 has five for each")
    pairs[image] = references
  return pairs


def _without_references(folder: pathlib.Path, pattern: str) -> Pairs:
  return {path: () for path in _images(folder) if path.match(pattern)}


def _hashed(find: Callable[[], Pairs], held_out: bool) -> Pairs:  # noqa: FBT001
  pairs = find()
  names = sorted({composed(image.name) for image in pairs}, key=hash_name)
  part = {name for name, _ in hold_out([(name, 0) for name in names], TEST_FRACTION)[held_out]}
  return {image: refs for image, refs in pairs.items() if composed(image.name) in part}


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
  found = (path for path in _listing(folder) if path.suffix.lower() in suffixes())
  return sorted(filter(pathlib.Path.is_file, found), key=_natural)


def _listing(folder: pathlib.Path) -> Iterable[pathlib.Path]:
  return (p for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else ()


def _natural(path: pathlib.Path) -> list[tuple[int, str]]:
  return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", path.name)]
