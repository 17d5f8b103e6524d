"""Pictures with references for super-resolution: your own, and the published data sets.

    input/a.jpg input/b.png  ref/a.jpg ref/b/1.jpg ref/b/2.jpg     your own: one or more for each
    train/input train/ref  test/input test/ref                     the same, split as folders say
    train/input train/ref  test/CUFED5/000_0.png ... 000_5.png     CUFED and CUFED5
    Sun_Hays_SR_groundtruth/a.jpg Sun_Hays_SR_scenematches/a.jpg/  Sun80
    image_SRF_4/img_001_SRF_4_HR.png ...                           Urban100
    ARMS.png ...                                                   Manga109, any folder of pictures

A picture belongs to the reference, or to the folder of references, of its own name; suffixes may
differ. Where all of one picture's are asked for, they are in the order of their names. Your own
pictures without `train/` are split by a hash of their names, as `folder:` splits them; the
published test sets are `test` alone. Which reference is taken is the option `reference`:

    "1" ... "5"   that one of a picture's references; of CUFED5 the most similar is "1"
    "random"      one of them, always the same for the same file name; the authors' way with Sun80
    "all"         all; a transform stitches them
    "self"        none: the small picture refers to itself, the authors' way with Urban100, Manga109
"""

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from vit_jax_zoo.data.images import suffixes
from vit_jax_zoo.data.sources.base import DatasetInfo, Example, Source, Splits, name_validation
from vit_jax_zoo.data.sources.folder import TEST_FRACTION
from vit_jax_zoo.errors import unknown_name

REFERENCES = ("1", "2", "3", "4", "5", "random", "all", "self")
"""What the option `reference` may be."""

Pairs: TypeAlias = Mapping[pathlib.Path, tuple[pathlib.Path, ...]]
"""Each picture's references, in order."""

_SPLITS = ("train", "test", "val", "valid", "validation")
_CUFED5 = "test/CUFED5"
_SUN80, _SUN80_REFERENCES = "Sun_Hays_SR_groundtruth", "Sun_Hays_SR_scenematches"
_URBAN100 = "image_SRF_4"


class PairSource(Source):
  """Pictures and references, still encoded.

  An example has `image`, bytes, and `reference`: bytes; or a tuple of them, for "all"; or None,
  where the small picture is to be its own reference.
  """

  def __init__(self, info: DatasetInfo, pairs: Pairs) -> None:
    self.info = info
    self._pairs = [(str(image), tuple(map(str, refs))) for image, refs in pairs.items()]
    self._stitched = False

  def __getitem__(self, index: int) -> Example:
    image, references = self._pairs[index]
    found = tuple(_read(path) for path in references)
    reference = found if self._stitched else next(iter(found), None)
    return {"image": _read(image), "reference": reference}

  def example_name(self, index: int) -> str:
    """Returns the path of the picture."""
    return self._pairs[index][0]

  def stitched(self) -> "PairSource":
    """Hands out all references of a picture, as a tuple, from now on."""
    self._stitched = True
    return self


def open_splits(location: str, reference: str | int = "1") -> Splits:
  """Finds pictures and their references below a folder.

  Args:
    location: the folder, on a disk of this machine; the module's docstring has its layouts.
    reference: which of a picture's references is taken, one of `REFERENCES`.

  Raises:
    FileNotFoundError: there is no such folder, or a picture has no such reference.
    ValueError: an unknown `reference`, a folder in no known layout, or one without references.
  """
  reference = str(reference)
  if reference not in REFERENCES:
    raise ValueError(unknown_name("reference", reference, REFERENCES))
  root = pathlib.Path(location).expanduser()
  if "://" in location or not root.is_dir():
    raise FileNotFoundError(
      f"pairs:{location} is not a folder on a local disk; expected input/ and ref/ in it, or a "
      "data set as published (demo:stereo needs no files)"
    )
  splits = {
    name: functools.partial(_open, f"pairs:{location}", find, reference)
    for name, find in _find_layout(root).items()
  }
  return name_validation(splits)


def _open(name: str, find: Callable[[], Pairs], reference: str) -> PairSource:
  pairs = {image: _choose(image, refs, reference) for image, refs in find().items()}
  source = PairSource(DatasetInfo(name, len(pairs)), pairs)
  return source.stitched() if reference == "all" else source


def _choose(
  image: pathlib.Path, references: tuple[pathlib.Path, ...], reference: str
) -> tuple[pathlib.Path, ...]:
  """Returns the references that are taken of a picture's."""
  if reference == "self":
    return ()
  if not references:
    raise FileNotFoundError(
      f"{image} has no reference; add one of its name, or set reference='self', with which the "
      "small picture is its own"
    )
  if reference == "all":
    return references
  if reference == "random":
    return (references[_hash(image.name) % len(references)],)
  if int(reference) > len(references):
    raise FileNotFoundError(
      f"{image} has no reference number {reference}; it has {len(references)}, the last of them "
      f"{references[-1]}"
    )
  return (references[int(reference) - 1],)


def _find_layout(root: pathlib.Path) -> dict[str, Callable[[], Pairs]]:
  """Returns what finds the pairs of each split, in whatever layout they lie."""
  found: dict[str, Callable[[], Pairs]] = {
    split: functools.partial(_named_alike, root / split / "input", root / split / "ref")
    for split in _SPLITS
    if (root / split / "input").is_dir()
  }
  for folder in (root / _CUFED5, root):
    if "test" not in found and folder.is_dir() and any(folder.glob("*_0.png")):
      found["test"] = functools.partial(_cufed5, folder)
  if found:
    return found
  if (root / "input").is_dir():
    whole = functools.partial(_named_alike, root / "input", root / "ref")
    parts = {"train": False, "test": True}
    return {"all": whole} | {k: functools.partial(_hashed, whole, v) for k, v in parts.items()}
  if (root / _SUN80).is_dir():
    return {"test": functools.partial(_named_alike, root / _SUN80, root / _SUN80_REFERENCES)}
  if (root / _URBAN100).is_dir():
    return {"test": functools.partial(_alone, root / _URBAN100, "*_HR.png")}
  if _images(root):
    return {"test": functools.partial(_alone, root, "*")}
  raise ValueError(
    f"pairs:{root} holds no pictures in a known layout; expected input/ and ref/, train/input and "
    f"train/ref, {_CUFED5}, {_SUN80}, {_URBAN100}, or pictures"
  )


def _named_alike(inputs: pathlib.Path, references: pathlib.Path) -> Pairs:
  """Pairs pictures with files of their name, or with the files of a folder of their name."""
  images = _images(inputs)
  if not images:
    raise ValueError(f"{inputs} holds no images, of {', '.join(sorted(suffixes()))}")
  known: dict[str, tuple[pathlib.Path, ...]] = {p.stem: (p,) for p in _images(references)}
  folders = [path for path in _listing(references) if path.is_dir()]
  for folder in folders:
    known[folder.name] = tuple(_images(folder))
  return {image: known.get(image.name) or known.get(image.stem, ()) for image in images}


def _cufed5(folder: pathlib.Path) -> Pairs:
  """Pairs `000_0.png` with `000_1.png` to `000_5.png`."""
  pairs = {}
  for image in sorted(folder.glob("*_0.png")):
    references = tuple(folder / f"{image.name[:-5]}{level}.png" for level in range(1, 6))
    for path in references:
      if not path.is_file():
        raise FileNotFoundError(f"{image} has no reference {path.name}; CUFED5 has five for each")
    pairs[image] = references
  return pairs


def _alone(folder: pathlib.Path, pattern: str) -> Pairs:
  """Takes pictures that have no references."""
  return {path: () for path in _images(folder) if path.match(pattern)}


def _hashed(find: Callable[[], Pairs], held_out: bool) -> Pairs:  # noqa: FBT001
  """Returns the part of the pairs that is held out, or the other."""
  bound = TEST_FRACTION * 2**64
  return {k: v for k, v in find().items() if (_hash(k.name) < bound) == held_out}


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the image files in a folder, numbers in their names in the order of their values."""
  found = [path for path in _listing(folder) if path.suffix.lower() in suffixes()]
  return sorted((path for path in found if path.is_file()), key=_natural)


def _listing(folder: pathlib.Path) -> Iterable[pathlib.Path]:
  return folder.iterdir() if folder.is_dir() else ()


def _natural(path: pathlib.Path) -> list[tuple[int, str]]:
  """Sorts 2.jpg before 10.jpg."""
  return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", path.name)]


def _read(path: str) -> bytes:
  with open(path, "rb") as file:
    return file.read()


def _hash(name: str) -> int:
  """Returns a number in [0, 2**64) that depends on the name alone."""
  return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
