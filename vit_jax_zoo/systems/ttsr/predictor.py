"""4x super-resolution of a user's image: `predict --reference=ref.jpg`.

Large images are processed in two tiled passes with bounded memory, equal to a single pass within
rounding:

1. the search: the reference's features are computed once, and windows of the image are compared
   with all of them. Windows overlap by the receptive field of the features;
2. the rest of the network, in windows that overlap by its receptive field (`TTSR.reach`), of which
   the centre is kept.
"""

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from absl import logging
from jaxtyping import Array, Float, Num, UInt8

from vit_jax_zoo.data.transforms.super_resolution import SCALE, crop_to_multiple, enlarge, shrink
from vit_jax_zoo.inference.base import Image, Options, Prediction, Trained
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.ttsr.figures import draw_results
from vit_jax_zoo.systems.ttsr.search import Match, find_matches, transfer
from vit_jax_zoo.systems.ttsr.task import to_pixels

WINDOW = 360
"""Default of `--tile`: side of a window, in pixels of the input (as many as 480x270 has). Images
with no more pixels are processed at once."""

SEARCH_REACH = 8
"""Bound of the receptive field of a patch of features: radius in pixels of the input (it is 5)."""

_LOG_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Reference:
  """A reference image and its features.

  Attributes:
    image: the image, cropped to multiples of 4.
    searched: features of the blurred image, the keys of the search [1 i j c].
    textures: features of the image, the coarsest level first.
  """

  image: Any
  searched: Any
  textures: tuple[Any, ...]


class SuperResolutionPredictor:
  """Enlarges images four times; the reference's features are computed once."""

  reads: ClassVar[frozenset[str]] = frozenset({"reference", "tile"})

  def __init__(self, trained: Trained, options: Options) -> None:
    """Prepares the model and the reference.

    Args:
      trained: the model, of a run or of a published file.
      options: `reference`, and optionally `tile`; see `WINDOW`.

    Raises:
      ValueError: the reference is missing or too small, or the tile is too small for the model.
    """
    if options.reference is None:
      raise ValueError("--reference: missing; super-resolution needs one, --reference=ref.jpg")
    self._model: Any = trained.model
    params = trained.variables["params"]
    self._variables = {"params": params.get("generator", params)}
    self._window = WINDOW if options.tile is None else options.tile
    self._least_window = 2 * max(self._model.reach, SEARCH_REACH) + 1
    if self._window < self._least_window:
      raise ValueError(
        f"--tile: {self._window} pixels; expected at least {self._least_window} for this model"
      )
    self._reference_image = crop_to_multiple(options.reference, "the reference")
    self._reference: Reference | None = None
    frugal = functools.partial(jax.jit, compiler_options=compiler_options())
    self._features = frugal(self._model_features, static_argnames="precise")
    self._search = frugal(self._search_window)
    self._restore = frugal(self._restore_window)

  def __call__(self, image: Image) -> Prediction:
    """Returns the enlarged image, and a figure of the source positions of its textures.

    Raises:
      ValueError: out of memory; the message suggests a smaller tile.
    """
    try:
      return self._enlarge(image)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if getattr(error, "error_code_string", "RESOURCE_EXHAUSTED") != "RESOURCE_EXHAUSTED":
        raise
      raise ValueError(self._too_large(image)) from error

  def _too_large(self, image: Image) -> str:
    """Returns the message for memory errors; no tile that is mostly overlap is suggested."""
    height, width = image.shape[:2]
    side, least = min(self._window, math.isqrt(height * width)), self._least_window * 9 // 8
    smaller = f"a smaller tile (slower), --tile={max(side * 3 // 4, least)}, or "
    sizes = " and ".join(f"{x.shape[1]}x{x.shape[0]}" for x in (image, self._reference_image))
    return (
      f"out of memory: image and reference have {sizes} pixels; use "
      f"{smaller if side > least else ''}a smaller reference"
    )

  def _enlarge(self, image: Image) -> Prediction:
    upsampled = enlarge(image, [SCALE * side for side in image.shape[:2]])
    match = self._match(upsampled)
    result, windows = self._assemble(image, match)
    index, soft = (np.asarray(x[0]) for x in match)
    record = {
      "size": list(result.shape[:2]),
      "reference_size": list(self._reference_image.shape[:2]),
      "windows": windows,
      "mean_soft_attention": float(soft.mean()),
      "reference_cells_used": len(np.unique(index)),
    }
    batch = {
      "low_res_image": image[None],
      "upsampled_image": upsampled[None],
      "ref_image": self._reference_image[None],
    }
    found = {"image": result[None], "hard_attention": index[None], "soft_attention": soft[None]}
    figure = draw_results(batch, found, title="Source positions of the textures")
    return Prediction(record, {"": result, "search": figure})

  def _read_reference(self) -> Reference:
    image = self._reference_image
    blurred = enlarge(shrink(image), image.shape[:2])
    return Reference(
      image,
      self._features(_batch(blurred), precise=True)[2],
      self._features(_batch(image), precise=False)[::-1],
    )

  def _match(self, upsampled: UInt8[np.ndarray, "h4 w4 3"]) -> Match:
    """Returns the match of each patch of the image in the whole reference."""
    height, width = (side // SCALE for side in upsampled.shape[:2])
    index = np.zeros((1, height, width), np.int32)
    relevance = np.zeros((1, height, width), np.float32)
    windows = list(cut((height, width), self._window, SEARCH_REACH))
    for part in _progress(windows, "searching"):
      found = self._search(_batch(upsampled[part.outer(SCALE)]), self._known.searched)
      index[part.kept()] = np.asarray(found.index)[part.middle()]
      relevance[part.kept()] = np.asarray(found.relevance)[part.middle()]
    return Match(jnp.asarray(index), jnp.asarray(relevance))

  def _assemble(self, image: Image, match: Match) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
    """Enlarges window by window; returns the image and the number of windows."""
    result = np.zeros((1, *(SCALE * side for side in image.shape[:2]), 3), np.uint8)
    windows = list(cut(image.shape[:2], self._window, self._model.reach))
    for part in _progress(windows, "enlarging"):
      rows, columns = part.outer()
      around = Match(*(x[:, rows, columns] for x in match))
      made = self._restore(_batch(image[rows, columns]), around, self._known.textures)
      result[part.kept(SCALE)] = np.asarray(made)[part.middle(SCALE)]
    return result[0], len(windows)

  @property
  def _known(self) -> Reference:
    if self._reference is None:
      self._reference = self._read_reference()
    return self._reference

  def _model_features(self, images: Num[Array, "b h w 3"], *, precise: bool) -> tuple[Array, ...]:
    images = normalize_images(images)
    return self._model.apply(self._variables, images, precise=precise, method="textures")

  def _search_window(self, upsampled: Num[Array, "1 h w 3"], searched: Array) -> Match:
    asked = self._model_features(upsampled, precise=True)[2]
    return find_matches(asked, searched, block_size=self._model.block_size)

  def _restore_window(
    self, image: Num[Array, "1 h w 3"], match: Any, textures: tuple[Float[Array, "1 ..."], ...]
  ) -> Array:
    grid = textures[0].shape[2]
    found = [
      transfer(features, match.index, grid_width=grid, scale=scale)
      for features, scale in zip(textures, (1, 2, 4), strict=True)
    ]
    made = self._model.apply(
      self._variables, normalize_images(image), match.relevance, found, method="restore"
    )
    return to_pixels(made)


@functools.cache
def compiler_options() -> dict[str, bool | str] | None:
  """Returns XLA's options to schedule for low memory on CPUs; None if XLA has none.

  By default XLA schedules for parallelism: an image of 480x270 with a reference of 1920x1080 then
  takes 4.2 GB, not 3.4.
  """
  options: dict[str, bool | str] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(jnp.negative).lower(0.0).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError:  # other versions of XLA name it differently
    return None
  return options


@dataclasses.dataclass(frozen=True)
class Window:
  """A window of an image, in pixels of the input.

  Attributes:
    top: first row.
    left: first column.
    height: number of rows.
    width: number of columns.
    kept_rows: range of the image's rows whose results are kept.
    kept_columns: range of columns whose results are kept.
  """

  top: int
  left: int
  height: int
  width: int
  kept_rows: tuple[int, int]
  kept_columns: tuple[int, int]

  def outer(self, scale: int = 1) -> tuple[slice, slice]:
    """Returns the slices of the window in an image of `scale` times the sides."""
    return (
      slice(scale * self.top, scale * (self.top + self.height)),
      slice(scale * self.left, scale * (self.left + self.width)),
    )

  def kept(self, scale: int = 1) -> tuple[slice, slice, slice]:
    """Returns the slices of the kept centre in the whole result [1 h w ...]."""
    rows, columns = (
      slice(scale * start, scale * stop) for start, stop in (self.kept_rows, self.kept_columns)
    )
    return slice(None), rows, columns

  def middle(self, scale: int = 1) -> tuple[slice, slice, slice]:
    """Returns the slices of the kept centre in the window's result [1 h w ...]."""
    rows, columns = (
      slice(scale * (start - first), scale * (stop - first))
      for (start, stop), first in ((self.kept_rows, self.top), (self.kept_columns, self.left))
    )
    return slice(None), rows, columns


def cut(size: tuple[int, ...], window: int, reach: int) -> Iterator[Window]:
  """Yields windows of one size whose kept centres partition an image.

  Args:
    size: height and width of the image.
    window: maximum side of a window; an image with at most `window`^2 pixels is one window.
    reach: minimum distance of the kept centre from the window's edges inside of the image.
  """
  height, width = size
  if height * width <= window**2:
    yield Window(0, 0, height, width, (0, height), (0, width))
    return
  for top, rows, kept_rows in _cut_side(height, window, reach):
    for left, columns, kept_columns in _cut_side(width, window, reach):
      yield Window(top, left, rows, columns, kept_rows, kept_columns)


def _cut_side(length: int, window: int, reach: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
  """Yields first, length and kept range of the windows along one side."""
  if length <= window:
    yield 0, length, (0, length)
    return
  kept, core = 0, window - 2 * reach
  while kept < length:
    first = min(max(kept - reach, 0), length - window)
    last = length if first + window == length else max(kept + core, first + window - reach)
    yield first, window, (kept, last)
    kept = last


def _progress(windows: list[Window], what: str) -> Iterator[Window]:
  """Yields windows with a progress bar on a terminal, else with a log line from time to time.

  A single window shows the elapsed time alone.
  """
  console = rich.console.Console(stderr=True)
  if console.is_terminal:
    columns = rich.progress.Progress.get_default_columns()
    if len(windows) == 1:
      columns = (*columns[:2], rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
      task = bar.add_task(what, total=len(windows) if len(windows) > 1 else None)
      for window in windows:
        yield window
        bar.advance(task)
    return
  if len(windows) == 1:
    with _log_elapsed_time(what):
      yield windows[0]
    return
  begin = logged = time.monotonic()
  for done, window in enumerate(windows):
    now = time.monotonic()
    if done and now - logged > _LOG_SECONDS:
      logged, left = now, (now - begin) / done * (len(windows) - done)
      logging.info("%s: %d/%d windows, ETA %.0f s", what, done, len(windows), left)
    yield window


@contextlib.contextmanager
def _log_elapsed_time(what: str) -> Iterator[None]:
  done = threading.Event()

  def log() -> None:
    begin = time.monotonic()
    while not done.wait(_LOG_SECONDS):
      logging.info("%s: %.0f s so far", what, time.monotonic() - begin)

  thread = threading.Thread(target=log, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _batch(image: UInt8[np.ndarray, "h w 3"]) -> Array:
  return jnp.asarray(image)[None]
