"""Loads models for inference, from runs and from published checkpoints.

`load_pretrained` returns model and variables; `load` also the task that they were trained for and
the preprocessing, that of the run's evaluations or of the file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from vit_jax_zoo import weights
from vit_jax_zoo.data import images as image_ops
from vit_jax_zoo.data.transforms import Transform, build_transforms
from vit_jax_zoo.data.transforms.detection import ResizeShorter
from vit_jax_zoo.data.transforms.image import CentralCrop, Resize, ResizeSmall
from vit_jax_zoo.errors import field_names
from vit_jax_zoo.inference.base import Image, Trained
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.run_metadata import CONFIG_FILE, RunData, fill_from_data, load_run, main_evaluation
from vit_jax_zoo.tasks import create_task, task_fields, tasks
from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.training.checkpoint import is_checkpoint, restore_variables
from vit_jax_zoo.weights import Preprocess, Pretrained


def load_pretrained(path: str, **options: Any) -> Pretrained:
  """Reads a published checkpoint, or a run's checkpoint.

  Args:
    path: as in `weights.load_pretrained`; or a run's `--workdir`, or one of its checkpoints.
    **options: as in `weights.load_pretrained`. For a run: `image_size` (a ViT's position embeddings
      are interpolated), `num_classes` (None drops the head, another number zero-initialises it),
      and fields of the model that do not change its parameters (`dtype`, `scan_layers`, ...).

  Raises:
    ValueError: as in `weights.load_pretrained`; or the run's checkpoint does not fit its config.
    FileNotFoundError: the run has no config.json.
  """
  if not is_checkpoint(path):
    return weights.load_pretrained(path, **options)
  run = _Run.read(path)
  wanted = options.pop("image_size", None)
  model = run.model(options)
  seen = run.image_size(model)
  size = seen if wanted is None else _height_width(wanted)
  if size != seen or options.get("num_classes") is not None:
    variables = _refitted(run, model, seen, size)
  else:
    variables = _adapted(run, model)
  preprocess = run.preprocess(seen)
  if wanted is not None:
    preprocess = preprocess.at_size(_height_width(wanted))
  config = {name: getattr(model, name) for name in field_names(model)}
  return Pretrained(
    model,
    dict(variables),
    preprocess,
    {**config, "image_size": size},
    task=run.config["task"]["name"],
    task_fields=_fields_beside(run, model),
  )


def _fields_beside(run: "_Run", model: Any) -> dict[str, Any]:
  """Returns the task's fields without mean and std; no class names if the classes differ."""
  fields = {k: v for k, v in run.task_fields().items() if k not in ("image_mean", "image_std")}
  if "num_classes" in fields and getattr(model, "num_classes", None) != fields["num_classes"]:
    fields = {k: v for k, v in fields.items() if k not in ("num_classes", "class_names")}
  return fields


def load(
  path: str, *, class_names: Sequence[str] = (), needs_head: bool = True, **options: Any
) -> Trained:
  """Loads a model with its task and preprocessing.

  Args:
    path: see `load_pretrained`.
    class_names: names in order, for files that lack them.
    needs_head: rejects files without a classifier; if False, they are loaded for their features.
    **options: see `load_pretrained`.

  Raises:
    ValueError: as in `load_pretrained`; or the number of names is not the number of classes.
  """
  if is_checkpoint(path):
    return _load_run(path, class_names, options)
  published = weights.load_pretrained(path, **options)
  if not published.task:
    raise ValueError(
      f"{path} holds a part of a network, not a model of images; train a detector initialised from "
      "it: --config.task.neck_file"
    )
  if published.task == "classification" and published.config.get("num_classes") is None:
    if needs_head:
      raise ValueError(f"{path} has no classifier; fine-tune it, or give weights with a head")
    published.config["num_classes"] = 1  # a placeholder: only features are used
  if class_names:
    published.task_fields["class_names"] = tuple(class_names)
  preprocess = published.preprocess
  return Trained(
    source=path,
    task=task_of(published),
    variables=published.variables,
    prepare=functools.partial(_prepare_published, preprocess),
    image_size=preprocess.image_size if preprocess.has_fixed_size else None,
    model_name=epath.Path(path).name or path,
  )


def task_of(pretrained: Pretrained) -> Task:
  """Returns the task of a pretrained model, with the mean and std of its preprocessing."""
  preprocess = pretrained.preprocess
  fields = {
    **pretrained.task_fields,
    "num_classes": pretrained.config.get("num_classes"),
    "image_mean": preprocess.mean,
    "image_std": preprocess.std,
  }
  known = task_fields(pretrained.task)
  known_fields = {key: value for key, value in fields.items() if key in known}
  return create_task(pretrained.task, pretrained.model, **known_fields)


def _prepare_published(preprocess: Preprocess, image: Image) -> dict[str, np.ndarray]:
  resized = preprocess.resize(preprocess.from_rgb(image))
  if preprocess.pad_size is None:
    return {"image": resized}
  size = np.array(resized.shape[:2], np.int32)
  return {"image": preprocess.pad(resized), "image_size": size}


def _load_run(path: str, class_names: Sequence[str], options: Mapping[str, Any]) -> Trained:
  run = _Run.read(path)
  options = dict(options)
  wanted = options.pop("image_size", None)
  model = run.model(options)
  seen = run.image_size(model)
  size = seen if wanted is None else _height_width(wanted)
  fields = run.task_fields()
  if class_names:
    fields["class_names"] = tuple(class_names)
  return Trained(
    source=path,
    task=create_task(run.config["task"]["name"], model, **fields),
    variables=_adapted(run, model) if size == seen else _refitted(run, model, seen, size),
    prepare=run.prepare(seen, size, is_resized=wanted is not None),
    image_size=size,
    model_name=run.config["model"]["name"],
    config=run.config,
  )


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


def _at_size(transform: Transform, seen: tuple[int, int], size: tuple[int, int]) -> Transform:
  """Returns an evaluation's transform with its sizes scaled from images of `seen` to `size`."""
  if not isinstance(transform, Resize | ResizeSmall | CentralCrop):
    return transform
  ratios = [new / old for new, old in zip(size, seen, strict=True)]
  if isinstance(transform, ResizeSmall):
    return dataclasses.replace(transform, size=round(transform.size * max(ratios)))
  height, width = _height_width(transform.size)
  scaled = round(height * ratios[0]), round(width * ratios[1])
  return dataclasses.replace(transform, size=scaled)


def _prepare_for_run(
  transforms: Sequence[Transform], size: tuple[int, int] | None, fit: str, image: Image
) -> dict[str, Any]:
  """Applies an evaluation's transforms; first resizes the image as in `_Run.fit` if none does.

  That is for datasets whose images all have one size, so that no transform states it.
  """
  example: dict[str, Any] = {"image": image}
  if size is not None and not any(_fixes_size(transform) for transform in transforms):
    example["image"] = _fitted(image, size, fit)
  rng = np.random.default_rng(0)  # evaluations are deterministic
  for transform in transforms:
    example = transform(example, rng)
  return example


def _fitted(image: Image, size: tuple[int, int], fit: str) -> UInt8[np.ndarray, "i j 3"]:
  if fit == "as_is":
    return image
  if fit == "shorter_side":
    scale = min(size) / min(image.shape[:2])
    size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
  return image_ops.resize(image, *size)


def _fixes_size(transform: Transform) -> bool:
  return hasattr(transform, "size") or hasattr(transform, "shorter")


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run on disk.

  Attributes:
    path: the user's path: a workdir, or one of its checkpoints.
    config: config of the run, from JSON.
    data: metadata of its datasets.
    variables: variables of the best checkpoint, numpy arrays.
  """

  path: str
  config: Mapping[str, Any]
  data: RunData
  variables: Variables

  @classmethod
  def read(cls, path: str) -> "_Run":
    """Reads the run.

    Raises:
      FileNotFoundError: the run has no config.json.
      ValueError: its checkpoint is damaged, or contains NaN or infinity.
    """
    config, data = load_run(_workdir_of(path))
    variables = restore_variables(path)
    weights.check_finite(variables, path)
    if data.num_classes is None:
      data = dataclasses.replace(data, num_classes=_count_classes(variables))
    return cls(path, config, data, variables)

  def model(self, options: Mapping[str, Any]) -> Any:
    """Returns the model of the config, with the user's fields."""
    fields = fill_from_data(self.config["model"], self.data)
    return create_model(**{**_as_fields(fields), **options})

  def task_fields(self) -> dict[str, Any]:
    """Returns the fields of the task except its name, filled from the data."""
    fields = fill_from_data(self.config["task"], self.data)
    return {key: value for key, value in fields.items() if key != "name"}

  def _evaluation(self) -> Mapping[str, Any]:
    """Returns the evaluation that chose the best checkpoint, by default `main_evaluation`."""
    evaluations = self.config["data"]["eval"]
    chosen = (self.config["checkpoint"].get("best") or "").split("/")[0]
    return evaluations.get(chosen) or evaluations.get(main_evaluation(evaluations)) or {}

  def transforms(self) -> tuple[Transform, ...]:
    """Returns the evaluation's transforms of images."""
    transforms = build_transforms(self._evaluation().get("transforms", []))
    return tuple(transform for transform in transforms if not transform.is_target)

  @property
  def fit(self) -> str:
    """How images are resized to the size of the run's if no transform does it.

    "squeeze": to that size; "shorter_side": to its shorter side, with the aspect ratio kept;
    "as_is": not resized, for runs that evaluate padded images of any size.
    """
    if not tasks()[self.config["task"]["name"]].keeps_aspect_ratio:
      return "squeeze"
    names = {spec["name"] for spec in self._evaluation().get("transforms", [])}
    return "as_is" if "pad_label_map" in names else "shorter_side"

  def image_size(self, model: Any) -> tuple[int, int] | None:
    """Returns height and width of the images that the model was trained on; None if unknown."""
    shape = self.data.shapes.get("image")
    if shape:
      return int(shape[0]), int(shape[1])
    return getattr(model, "image_size", None)

  def prepare(
    self, seen: tuple[int, int] | None, size: tuple[int, int] | None, *, is_resized: bool
  ) -> Callable[[Image], Mapping[str, Any]]:
    """Returns the function from a user's image to an example of an evaluation.

    Args:
      seen: height and width of the run's images, if known.
      size: height and width of the images for inference, if known.
      is_resized: whether the user requested `size`.
    """
    if self.exported_preprocess is not None:
      preprocess = self.exported_preprocess
      preprocess = preprocess.at_size(size) if is_resized and size else preprocess
      return functools.partial(_prepare_published, preprocess)
    transforms = self.transforms()
    if is_resized and size:
      transforms = tuple(_at_size(transform, seen or size, size) for transform in transforms)
    return functools.partial(_prepare_for_run, transforms, size, self.fit)

  @property
  def exported_preprocess(self) -> Preprocess | None:
    """The preprocessing of a published model, if this is its export with `--format=orbax`."""
    fields = self.config.get("preprocess")
    return None if fields is None else Preprocess(**_as_fields(fields))

  def preprocess(self, size: tuple[int, int] | None) -> Preprocess:
    """Returns the evaluation's transforms as the preprocessing of a pretrained model."""
    if self.exported_preprocess is not None:
      return self.exported_preprocess
    fields, task_class = self.task_fields(), tasks()[self.config["task"]["name"]]
    mean, std = (
      _frozen(fields.get(name, getattr(task_class, name, 0.5)))
      for name in ("image_mean", "image_std")
    )
    target = size or (224, 224)
    transforms: dict[type, Any] = {type(transform): transform for transform in self.transforms()}
    if (shorter := transforms.get(ResizeShorter)) is not None:
      sides = np.ravel(shorter.shorter)
      side, limit = (int(sides[0]),) * 2, shorter.longest
      return Preprocess(side, mean, std, "shorter_side", "bilinear", max_side=limit)
    if CentralCrop in transforms and (small := transforms.get(ResizeSmall)) is not None:
      share = target[0] / int(small.size)
      return Preprocess(target, mean, std, fit="crop", interpolation="bilinear", crop_pct=share)
    if (resize := transforms.get(Resize)) is not None:
      filters = {"bilinear": "tf_bilinear"}  # the others are antialiased
      name = filters.get(resize.method, "bilinear")
      return Preprocess(_height_width(resize.size), mean, std, interpolation=name)
    if self.fit == "shorter_side":
      return Preprocess((min(target),) * 2, mean, std, "shorter_side", "bilinear")
    fit, name = ("none", "bilinear") if self.fit == "as_is" else ("squash", "bilinear")
    return Preprocess(target, mean, std, fit, name)


def _as_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields with JSON's lists as tuples: Linen requires hashable fields."""
  return {key: _frozen(value) for key, value in fields.items()}


def _frozen(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_frozen(item) for item in value)
  if isinstance(value, dict):
    return {key: _frozen(item) for key, item in value.items()}
  return value


def _workdir_of(path: str) -> epath.Path:
  """Returns the folder with the config: `path`, or one above it for a single checkpoint."""
  given = epath.Path(path).expanduser().absolute()
  folders = (given, given.parent, given.parent.parent)
  return next((folder for folder in folders if (folder / CONFIG_FILE).exists()), given)


def _count_classes(variables: Variables) -> int | None:
  """Returns the number of classes of the head, for runs without that metadata."""
  head = variables["params"].get("head", {})
  return head["kernel"].shape[-1] if "kernel" in head else None


def _adapted(run: _Run, model: Any) -> Variables:
  """Returns the run's variables in the model's layout; without the head if the model has none."""
  variables = run.variables
  has_head = getattr(model, "num_classes", 0) is not None
  if not has_head:
    params = {k: v for k, v in variables["params"].items() if k != "head"}
    variables = {**variables, "params": params}
  return weights.relayout(variables, scan_layers=getattr(model, "scan_layers", None))


def _refitted(
  run: _Run, model: Any, seen: tuple[int, int] | None, size: tuple[int, int] | None
) -> Variables:
  """Returns the run's variables fitted to a model with another head, or to images of `size`.

  Raises:
    ValueError: the run is not a classifier, or its parameters do not fit.
  """
  if run.config["task"]["name"] != "classification":
    raise ValueError(
      f"{run.path} is a run of {run.config['task']['name']}; image_size and num_classes can be "
      "changed for classifiers"
    )
  token_grid = getattr(model, "token_grid", None)
  if token_grid is None:  # only the head's shape differs
    variables, classes = _adapted(run, model), model.num_classes
    if classes in (None, _count_classes(variables)):
      return variables
    head = variables["params"].get("head", {})
    head = {k: np.zeros((*v.shape[:-1], classes), v.dtype) for k, v in head.items()}
    return {**variables, "params": {**variables["params"], "head": head}}
  images = jax.ShapeDtypeStruct((1, *(size or (224, 224)), 3), np.float32)
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  grids = [None if s is None else token_grid(s) for s in (seen, size)]
  return weights.adapt(run.variables, fresh, run.path, source_grid=grids[0], grid=grids[1])
