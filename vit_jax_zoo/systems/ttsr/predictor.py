"""4x super-resolution of a user's image: `predict --reference=ref.jpg`.

Large images are processed in two tiled passes with bounded memory, equal to a single pass within
rounding: the search, and the rest of the network. Windows overlap by the receptive field of each.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, UInt8

from vit_jax_zoo.data.transforms.super_resolution import SCALE, crop_to_multiple, enlarge, shrink
from vit_jax_zoo.inference import base
from vit_jax_zoo.inference.base import Image, Result
from vit_jax_zoo.inference.progress import track
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.ttsr.figures import draw_results
from vit_jax_zoo.systems.ttsr.search import Match, find_matches, transfer_levels
from vit_jax_zoo.systems.ttsr.task import to_pixels

# Default of `--tile`: side of a window, in pixels of the input (about 480x270 pixels). Images with
# no more pixels are processed at once.
WINDOW = 360
SEARCH_REACH = 8  # bounds the radius of the features' receptive field, 5, in pixels of the input


class SuperResolutionPredictor(base.Predictor):
  """Enlarges images four times; the reference's features are computed once."""

  reads: ClassVar[frozenset[str]] = frozenset({"reference", "tile"})

  def __init__(self, trained: base.Trained, options: base.Options) -> None:
    if options.reference is None:
      raise ValueError("--reference: missing; super-resolution needs one, --reference=ref.jpg")
    self._model: Any = trained.model
    params = trained.variables["params"]
    self._variables = {"params": params.get("generator", params)}
    self._window = WINDOW if options.tile is None else options.tile
    self._min_window = 2 * max(self._model.reach, SEARCH_REACH) + 1
    if self._window < self._min_window:
      expected = f"at least {self._min_window} for this model"
      raise ValueError(f"--tile: {self._window} pixels; expected {expected}")
    self._reference = crop_to_multiple(options.reference, "the reference")
    frugal = functools.partial(jax.jit, compiler_options=compiler_options())
    self._jitted_features = frugal(self._features, static_argnames="precise")
    self._jitted_search = frugal(self._search)
    self._jitted_restore = frugal(self._restore)

  @classmethod
  def example_input(cls, example: Mapping[str, Any]) -> dict[str, Image]:
    """Returns the small image, and its reference."""
    image, reference = (base.read_image(example[name]) for name in ("image", "reference"))
    return {"image": shrink(crop_to_multiple(image, "the image")), "reference": reference}

  def prepare(self, image: Image) -> dict[str, Image]:
    return {"image": image}

  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns enlarged images, each with a figure of the source positions of its textures."""
    del batch
    return [self._enlarge_or_advise(image) for image in images]

  def _enlarge_or_advise(self, image: Image) -> Result:
    try:
      return self._enlarge(image)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if getattr(error, "error_code_string", "RESOURCE_EXHAUSTED") != "RESOURCE_EXHAUSTED":
        raise
      side = min(self._window, math.isqrt(image.shape[0] * image.shape[1]))
      smallest = self._min_window * 9 // 8  # a smaller tile would be mostly overlap
      smaller = f"a smaller tile (slower), --tile={max(side * 3 // 4, smallest)}, or "
      advice = f"use {smaller if side > smallest else ''}a smaller reference"
      sizes = " and ".join(f"{x.shape[1]}x{x.shape[0]}" for x in (image, self._reference))
      wrong = f"out of memory: image and reference have {sizes} pixels"
      raise ValueError(f"{wrong}; {advice}") from error

  def _enlarge(self, image: Image) -> Result:
    upsampled = enlarge(image, [SCALE * side for side in image.shape[:2]])
    match = self._match(upsampled)
    result, windows = self._assemble(image, match)
    record = {
      "size": list(result.shape[:2]),
      "reference_size": list(self._reference.shape[:2]),
      "windows": windows,
      "mean_soft_attention": float(np.asarray(match.relevance).mean()),
      "reference_cells_used": len(np.unique(match.index)),
    }

    def draw() -> dict[str, base.Picture]:
      batch = {"low_res_image": image, "upsampled_image": upsampled, "ref_image": self._reference}
      batch = {name: x[None] for name, x in batch.items()}
      found = {"image": result[None]}
      found |= {"hard_attention": match.index, "soft_attention": match.relevance}
      title = "Super-resolution, and where its textures are from"
      return {"": result, "search": draw_results(batch, found, title=title)}

    size = f"{result.shape[1]}x{result.shape[0]}"
    return Result(record, draw, f"enlarged to {size} pixels", image=result)

  @functools.cached_property
  def _reference_features(self) -> tuple[Array, tuple[Array, ...]]:
    """The keys of the search [1 i j c], and the textures, the coarsest level first."""
    blurred = enlarge(shrink(self._reference), self._reference.shape[:2])
    keys = self._jitted_features(blurred[None], precise=True)[2]
    return keys, self._jitted_features(self._reference[None], precise=False)[::-1]

  def _match(self, upsampled: UInt8[np.ndarray, "h4 w4 3"]) -> Match:
    size = tuple(side // SCALE for side in upsampled.shape[:2])
    match = np.zeros((1, *size), np.int32), np.zeros((1, *size), np.float32)
    windows = list(cut(size, self._window, SEARCH_REACH))
    keys, _ = self._reference_features
    for part in track(windows, "searching", len(windows), "windows"):
      found = self._jitted_search(upsampled[scaled(part.outer)][None], keys)
      for whole, own in zip(match, found, strict=True):
        whole[0][part.core] = np.asarray(own)[0][part.middle]
    return Match(*map(jnp.asarray, match))

  def _assemble(self, image: Image, match: Match) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
    result = np.zeros((1, *(SCALE * side for side in image.shape[:2]), 3), np.uint8)
    windows = list(cut(image.shape[:2], self._window, self._model.reach))
    for part in track(windows, "enlarging", len(windows), "windows"):
      around = Match(*(x[:, *part.outer] for x in match))
      textures = self._reference_features[1]
      restored = self._jitted_restore(image[part.outer][None], around, textures)
      result[0][scaled(part.core)] = np.asarray(restored)[0][scaled(part.middle)]
    return result[0], len(windows)

  def _features(self, images: Num[Array, "b h w 3"], *, precise: bool) -> tuple[Array, ...]:
    images = normalize_images(images)
    return self._model.apply(self._variables, images, precise=precise, method="textures")

  def _search(self, upsampled: Num[Array, "1 h w 3"], keys: Array) -> Match:
    queries = self._features(upsampled, precise=True)[2]
    return find_matches(queries, keys, block_size=self._model.block_size)

  def _restore(self, image: Array, match: Match, values: tuple[Array, ...]) -> Array:
    inputs = normalize_images(image), match.relevance, transfer_levels(values, match.index)
    return to_pixels(self._model.apply(self._variables, *inputs, method="restore"))


@functools.cache
def compiler_options() -> dict[str, bool | str] | None:
  """Returns XLA's options to schedule for low memory on CPUs (3.4 instead of 4.2 GB), if any."""
  options: dict[str, bool | str] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(jnp.negative).lower(0.0).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError:  # other versions of XLA name it differently
    return None
  return options


class Window(NamedTuple):
  """A window of an image: (rows, columns) as slices, in pixels of the input."""

  outer: tuple[slice, ...]  # of the image
  core: tuple[slice, ...]  # of the image, those whose results are used
  middle: tuple[slice, ...]  # the core's, of the window


def scaled(slices: tuple[slice, ...]) -> tuple[slice, ...]:
  """Returns the slices in pixels of the output."""
  return tuple(slice(SCALE * side.start, SCALE * side.stop) for side in slices)


def cut(size: tuple[int, ...], window: int, reach: int) -> Iterator[Window]:
  """Yields windows of one size, of at most `window` a side, whose cores partition an image.

  Cores are `reach` or more from the windows' edges inside of the image. An image with at most
  `window`^2 pixels is one window.
  """
  if math.prod(size) <= window**2:
    window = max(size)
  for sides in itertools.product(*(_cut_side(side, window, reach) for side in size)):
    yield Window(*zip(*sides, strict=True))


def _cut_side(length: int, window: int, reach: int) -> Iterator[tuple[slice, slice, slice]]:
  window, start = min(window, length), 0
  while start < length:
    first = min(max(start - reach, 0), length - window)
    end = first + window
    stop = length if end == length else max(start + window - 2 * reach, end - reach)
    yield slice(first, end), slice(start, stop), slice(start - first, stop - first)
    start = stop
