"""The predictor protocol: from images to results, in batches."""

import abc
import collections
import concurrent.futures
import copy
import dataclasses
import functools
import io
import itertools
import numbers
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, overload

import jax
import numpy as np
import PIL.Image
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.data import images as image_files
from vit_jax_zoo.data.sources.base import CorruptExampleError
from vit_jax_zoo.errors import check_names
from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.registry import CORE, Option, registry_of, systems
from vit_jax_zoo.tasks.base import Task, Variables

Image: TypeAlias = UInt8[np.ndarray, "h w 3"]  # A user's picture, decoded: RGB, upright, any size
ImageLike: TypeAlias = str | os.PathLike | bytes | PIL.Image.Image | np.ndarray  # see `read_image`

_TYPES = {int: numbers.Integral, float: numbers.Real, bool: bool, pathlib.Path: np.ndarray}
Picture: TypeAlias = Figure | np.ndarray  # written as PNG; pixels are uint8 [h w 3], or [h w]


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained model, from a run or a published file."""

  source: str  # its path or name, for error messages
  task: Task  # with the model; `task.predict(variables, batch)` normalises images
  variables: Variables  # numpy arrays of the best checkpoint, averaged where the run has averages
  # To a preprocessed, unbatched example: `image` [h w 3] in [0, 255], and what transforms add.
  prepare: Callable[[Image], Mapping[str, Any]]
  image_size: tuple[int, int] | None  # height and width of the model's images; None: any
  model_name: str  # as the registry or the file names the model
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a run's, as JSON

  @property
  def model(self) -> Any:
    """The Linen module."""
    return getattr(self.task, "model")  # noqa: B009  (a field of every task, not of the protocol)


def list_options() -> list[Option]:
  """Returns the options of all predictors."""
  return [option for system in (CORE, *systems().values()) for option in system.options]


class Options(types.SimpleNamespace):
  """Values of `list_options` by name, those not given at their defaults; ValueError for others."""

  def __init__(self, **given: Any) -> None:
    defaults = {option.name: option.default for option in list_options()}
    check_names("option", given, defaults)
    for option in list_options():
      if not isinstance(value := given.get(option.name), _TYPES[option.type] | None):
        raise ValueError(f"--{option.name}: {value!r}; expected {option.type.__name__}")
    super().__init__(**{**defaults, **given}, given=frozenset(given))


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
  """Prediction for one image. What the task does not predict is empty or None."""

  record: dict[str, Any]  # JSON values by name
  # Called once, when needed: "" is `<image>.png` of `predict`, "x" `<image>_x.png`, and "model_x",
  # independent of the image, `model_x.png`.
  draw_pictures: Callable[[], Mapping[str, Picture]]
  summary: str = ""  # in one line
  labels: Sequence[str] = ()  # names, or numbers as text, of classes or objects, best first
  scores: Sequence[float] = ()  # probability of each label, in [0, 1]
  boxes: np.ndarray | None = None  # float [n 4] of each object: left, top, right, bottom, in pixels
  mask: np.ndarray | None = None  # integers [h w]: classes, or `id` in `segments` (0: none)
  image: np.ndarray | None = None  # uint8 [h w 3], produced by the model
  objects: Sequence[Mapping[str, Any]] | None = None  # COCO annotations without ids, with `name`
  segments: Sequence[Mapping[str, Any]] | None = None  # the same, of the picture "panoptic"

  @classmethod
  def of_objects(cls, objects: Sequence[Mapping[str, Any]], **fields: Any) -> "Result":
    """Returns the result with these COCO annotations, best first, and further fields."""
    labels = [found.get("name", str(found["category_id"])) for found in objects]
    scores = [found["score"] for found in objects]
    boxes = np.array([found["bbox"] for found in objects], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    parts = [f"{label} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    count = "1 object" if len(parts) == 1 else f"{len(parts)} objects"
    summary = f"{count}: {', '.join(parts)}" if parts else count
    fields |= {"labels": labels, "scores": scores, "boxes": boxes, "objects": objects}
    return cls(summary=summary, **fields)

  @functools.cached_property
  def pictures(self) -> Mapping[str, Picture]:
    """All pictures by name."""
    return self.draw_pictures()

  @property
  def masks(self) -> np.ndarray | None:
    """Mask of each object, bool [n h w]."""
    outlines = [found.get("segmentation") for found in self.objects or ()]
    if not all(outlines) or not outlines:
      return None
    encoded = [{**outline, "counts": outline["counts"].encode()} for outline in outlines if outline]
    return run_lengths.decode(encoded).transpose(2, 0, 1).astype(bool)

  def draw(self, name: str = "") -> PIL.Image.Image:
    """Returns a picture, by default the main one; ValueError for an unknown name."""
    if name not in self.pictures:
      raise ValueError(f"draw: {name!r}; expected one of {[*self.pictures]}, '' is the main one")
    picture = self.pictures[name]
    return PIL.Image.fromarray(render(picture) if isinstance(picture, Figure) else picture)

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values, those of `predictions.json` of `predict`."""
    return copy.deepcopy(self.record)

  def _repr_png_(self) -> bytes:
    stream = io.BytesIO()
    self.draw().save(stream, "PNG")
    return stream.getvalue()

  def __repr__(self) -> str:
    return f"Result({self.summary})"


class Predictor(abc.ABC):
  """Maps images to results; its creation raises ValueError for invalid options."""

  reads: ClassVar[frozenset[str]]  # names of its options; `create_predictor` raises for others
  batch_size: int = 1  # images of one size that are predicted at once, at most
  workers: int = 4  # threads that read and prepare images

  def __init__(self, trained: Trained, options: Options) -> None:
    """Compiles nothing; the first image is slow."""
    self._trained, self._options = trained, options
    self._task: Any = trained.task

  def prepare(self, image: Image) -> Mapping[str, Any]:
    """Returns the arrays of an image's example; called in threads."""
    return self._trained.prepare(image)

  def named(self, label: Any) -> dict[str, str]:
    """Returns a class's `name`, if it has one."""
    names, index = self._task.class_names, int(label)
    return {"name": names[index]} if index < len(names) else {}

  @classmethod
  def example_input(cls, example: Mapping[str, Any]) -> dict[str, Image]:
    """Returns `image`, and options that are images, of a dataset's example."""
    return {"image": read_image(example["image"])}

  @abc.abstractmethod
  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns the result of each image; the batch of their examples may have further rows."""

  @overload
  def __call__(self, images: ImageLike) -> Result: ...
  @overload
  def __call__(self, images: Iterable[ImageLike]) -> list[Result]: ...
  def __call__(self, images: Any) -> Any:
    """Returns the result of an image, or the list of several, computed in batches.

    An image is what `read_image` takes; ValueError for one that cannot be read or predicted.
    """
    is_file = isinstance(images, str | os.PathLike | bytes | PIL.Image.Image)
    is_single = is_file or not isinstance(images, Iterable) or getattr(images, "ndim", 0) in (2, 3)
    results: list[Result] = []
    for _, result in predict_each(self, [images] if is_single else images):
      if isinstance(result, ValueError):
        raise result
      results.append(result)
    return results[0] if is_single else results


def predictor_class(trained: Trained) -> type[Predictor]:
  """Returns the class of the predictor of a model's task; ValueError without one."""
  return registry_of("task to predict with", "predictors")[trained.task.name]


def create_predictor(trained: Trained, options: Options) -> Predictor:
  """Returns the predictor of a model's task; ValueError without one, or for an invalid option."""
  kind = predictor_class(trained)
  if unread := sorted(options.given - kind.reads):
    supported = ", ".join(f"--{option}" for option in sorted(kind.reads))
    raise ValueError(f"--{unread[0]}: not supported by this model's task; expected {supported}")
  trained = dataclasses.replace(trained, variables=jax.device_put(trained.variables))
  return kind(trained, options)


def read_image(source: ImageLike) -> Image:
  """Returns the pixels of a file, its bytes, a PIL image or an array; see docs/IMAGES.md.

  All but an array, uint8 [h w 3] RGB or [h w], is decoded as in training. ValueError if it cannot.
  """
  if isinstance(source, PIL.Image.Image):
    return image_files.from_pillow(source)
  if isinstance(source, bytes):
    return image_files.decode_image(source)
  if isinstance(source, str | os.PathLike):
    data = image_files.read_file(source)
    try:
      return image_files.decode_image(data)
    except CorruptExampleError as error:
      raise CorruptExampleError(f"{os.fspath(source)} cannot be read: {error}") from None
  array = np.asarray(source)
  if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] == (3,)) or not array.size:
    given = f"image: {array.dtype} {array.shape}"
    raise ValueError(f"{given}; expected uint8 [h w 3] (RGB) or [h w], 0 to 255")
  return array if array.ndim == 3 else np.stack([array] * 3, axis=2)


def predict_each(
  predictor: Predictor, sources: Iterable[ImageLike]
) -> Iterator[tuple[Image | None, Result | ValueError]]:
  """Yields each source's image and result, or error, in order; few are read ahead, in threads."""

  def _load(source: ImageLike) -> tuple[Image | None, Any]:
    try:
      image = read_image(source)
      return image, predictor.prepare(image)
    except ValueError as error:
      return None, error

  size, remaining, waiting = predictor.batch_size, iter(sources), collections.deque()
  with concurrent.futures.ThreadPoolExecutor(predictor.workers) as pool:
    while True:
      ahead = itertools.islice(remaining, size + max(size, predictor.workers) - len(waiting))
      waiting.extend(pool.submit(_load, source) for source in ahead)
      loaded = [waiting.popleft().result() for _ in range(min(size, len(waiting)))]
      if not loaded:
        return
      results = _predict_groups(predictor, loaded)
      yield from ((image, results[i]) for i, (image, _) in enumerate(loaded))


def _predict_groups(
  predictor: Predictor, loaded: Sequence[tuple[Any, Any]]
) -> dict[int, Result | ValueError]:
  """Predicts the examples of equal shapes together; returns results and errors by index."""
  results: dict[int, Result | ValueError] = {}
  groups: dict[Any, list[int]] = collections.defaultdict(list)
  for i, (_, example) in enumerate(loaded):
    if isinstance(example, ValueError):
      results[i] = example
    else:
      groups[tuple(sorted((key, np.shape(value)) for key, value in example.items()))].append(i)
  for shapes, members in groups.items():
    # Powers of two, the last row repeated: few programs are compiled.
    rows = min(predictor.batch_size, 1 << (len(members) - 1).bit_length())
    padded = [*members, *members[-1:] * (rows - len(members))]
    batch = {key: np.stack([loaded[i][1][key] for i in padded]) for key, _ in shapes}
    pictures = [image for i in members if (image := loaded[i][0]) is not None]
    try:
      results |= zip(members, predictor.predict(pictures, batch), strict=True)
    except ValueError as error:
      results |= dict.fromkeys(members, error)
  return results


MAX_PROGRAMS = 32  # compiled sizes of images that a predictor keeps, about 15 MB each


def jit_by_image_size(
  predict: Callable[[Any, Mapping[str, Any]], Any],
) -> Callable[[Any, Mapping[str, Any]], Any]:
  """Returns `jax.jit(predict)` with bounded memory for images of many sizes."""

  @functools.lru_cache(MAX_PROGRAMS)
  def program(_: tuple[int, ...]) -> Callable[[Any, Mapping[str, Any]], Any]:
    return jax.jit(functools.partial(predict))  # jax.jit shares programs between equal functions

  return lambda variables, batch: program(batch["image"].shape)(variables, batch)


def pad_example(
  example: Mapping[str, Any], round_up: Callable[[int], int]
) -> dict[str, np.ndarray]:
  """Returns `image`, zero-padded to sides by `round_up`, and `image_size` without padding."""
  image = np.asarray(example["image"])
  size = np.asarray(example.get("image_size", image.shape[:2]), np.int32)
  padding = [(0, round_up(side) - side) for side in image.shape[:2]]
  return {"image": np.pad(image, (*padding, (0, 0))), "image_size": size}
