"""Loads models, with their tasks and preprocessing, from runs and from published checkpoints."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_jax_zoo import weights
from vit_jax_zoo.data.sources.folder import ClassNames, read_class_names
from vit_jax_zoo.data.transforms import Transform, build_transforms
from vit_jax_zoo.data.transforms.detection import ResizeShorter
from vit_jax_zoo.data.transforms.image import CentralCrop, Resize, ResizeSmall, height_width
from vit_jax_zoo.errors import field_names, one_line, shorten
from vit_jax_zoo.inference import base
from vit_jax_zoo.inference.base import Image, Trained, create_predictor
from vit_jax_zoo.registry import create_model, family_of, systems
from vit_jax_zoo.run_metadata import CONFIG_FILE, RunData, fill_from_data, load_run, main_evaluation
from vit_jax_zoo.tasks import create_task, task_fields, tasks
from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.training.checkpoint import is_checkpoint, restore_variables
from vit_jax_zoo.weights import Preprocess, Pretrained
from vit_jax_zoo.weights.checkpoint import Size
from vit_jax_zoo.weights.preprocess import crop_fraction


def load_pretrained(path: str, **options: Any) -> Pretrained:
  """Reads a published checkpoint, as `weights.load_pretrained`, or a run or one of its checkpoints.

  Options for a run: `image_size` (a ViT's position embeddings are interpolated), `num_classes`
  (None drops the head, another number zero-initialises it), and fields of the model that do not
  change its parameters (`dtype`, `scan_layers`, ...). FileNotFoundError without a config.json.
  """
  if not is_checkpoint(path):
    return weights.load_pretrained(path, **options)
  run = _Run.read(path, options)
  preprocess, config = run.preprocess(), {n: getattr(run.model, n) for n in field_names(run.model)}
  task_fields = run.task_fields()
  count = task_fields.get("num_classes", config.get("num_classes"))
  other_classes = ("num_classes", "class_names") if config.get("num_classes") != count else ()
  for name in ("image_mean", "image_std", *other_classes):
    task_fields.pop(name, None)
  return Pretrained(
    run.model,
    dict(run.variables),
    preprocess if run.requested_size is None else preprocess.at_size(run.requested_size),
    {**config, "image_size": run.size},
    task=run.task_name,
    task_fields=task_fields,
  )


def load(
  path: str, *, class_names: ClassNames = None, needs_head: bool = True, **options: Any
) -> Trained:
  """Loads a model with its task and preprocessing; see `load_pretrained`.

  `class_names` are in order, or a text file of them, for files without names (ValueError for
  another number than the classes). Files without a classifier raise ValueError if `needs_head`.
  """
  named = {"class_names": names} if (names := read_class_names(class_names)) else {}
  if is_checkpoint(path):
    run = _Run.read(path, options)
    return Trained(
      source=path,
      task=create_task(run.task_name, run.model, **(run.task_fields() | named)),
      variables=run.variables,
      prepare=run.prepare(),
      image_size=run.size,
      model_name=run.config["model"]["name"],
      config=run.config,
    )
  published = weights.load_pretrained(path, **options)
  if not published.task:
    wrong = f"{path}: weights of a part of a network; expected a whole one"
    raise ValueError(f"{wrong}. Train with --config.task.<part>_file={path}")
  if published.task == "classification" and published.config.get("num_classes") is None:
    if needs_head:
      raise ValueError(f"{path}: has no classifier; fine-tune it, or use weights with a head")
    published.config["num_classes"] = 1  # a placeholder: only features are used
  published.task_fields.update(named)
  preprocess = published.preprocess
  return Trained(
    source=path,
    task=task_of(published),
    variables=published.variables,
    prepare=functools.partial(_prepare_published, preprocess),
    image_size=preprocess.image_size if preprocess.has_fixed_size else None,
    model_name=epath.Path(path).name or path,
  )


def predictor(
  model: str, *, batch_size: int | None = None, class_names: ClassNames = None, **options: Any
) -> base.Predictor:
  """Returns a predictor of images: `predictor("runs/detr_demo")("a.jpg")`, see `Predictor`.

  `model` is a run, a published file or folder, or a name of `list_models(pretrained=True)`;
  `batch_size` the number of images of one size that are predicted at once (None: 8 for classifiers,
  else 1); `class_names` as in `load`. `options` are flags of `vit_jax_zoo.predict`
  for the model's task: `top_k`, `explain`, `reference` (an image), ...; ValueError for others.
  """
  if not isinstance(model, str | pathlib.Path) or not str(model):
    raise ValueError(f"model: {model!r}; expected a run, a published file or folder, or its name")
  if batch_size is not None and not (isinstance(batch_size, int) and batch_size > 0):
    raise ValueError(f"batch_size: {batch_size!r}; expected an integer of at least 1")
  images = {option.name for option in base.list_options() if option.type is pathlib.Path}
  given = {k: base.read_image(v) if k in images else v for k, v in options.items()}
  created = create_predictor(load(model, class_names=class_names), base.Options(**given))
  created.batch_size = batch_size or created.batch_size
  return created


def task_of(pretrained: Pretrained) -> Task:
  """Returns the task of a pretrained model, with the mean and std of its preprocessing."""
  preprocess = pretrained.preprocess
  fields = {**pretrained.task_fields, "num_classes": pretrained.config.get("num_classes")}
  fields |= {"image_mean": preprocess.mean, "image_std": preprocess.std}
  names = task_fields(pretrained.task)
  fields = {name: value for name, value in fields.items() if name in names}
  return create_task(pretrained.task, pretrained.model, **fields)


def _prepare_published(preprocess: Preprocess, image: Image) -> dict[str, np.ndarray]:
  resized = preprocess.resize(preprocess.from_rgb(image))
  if preprocess.pad_size is None:
    return {"image": resized}
  return {"image": preprocess.pad(resized), "image_size": np.array(resized.shape[:2], np.int32)}


def _prepare_for_run(
  transforms: Sequence[Transform], preprocess: Preprocess | None, image: Image
) -> dict[str, Any]:
  """Applies the resize of `preprocess`, and then an evaluation's transforms."""
  example: dict[str, Any] = {"image": preprocess.resize(image) if preprocess else image}
  rng = np.random.default_rng(0)  # evaluations are deterministic
  for transform in transforms:
    example = transform(example, rng)
  return example


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run on disk, with its model as the user requested it."""

  path: str  # the user's path: a workdir, or one of its checkpoints
  config: Mapping[str, Any]  # of the run, from JSON
  data: RunData  # metadata of its datasets
  variables: Variables  # of the best checkpoint, numpy arrays that fit `model`
  model: Any
  trained_size: Size | None  # height and width of the images that it was trained on, if known
  requested_size: Size | None  # those that the user requested

  @classmethod
  def read(cls, path: str, options: Mapping[str, Any]) -> "_Run":
    """Reads the run; ValueError if its checkpoint is damaged, not finite, or of another shape."""
    given = epath.Path(path).expanduser().absolute()
    folders = (given, given.parent, given.parent.parent)
    workdir = next((folder for folder in folders if (folder / CONFIG_FILE).exists()), given)
    config, data = load_run(workdir)
    variables = restore_variables(path)
    weights.check_finite(variables, path)
    if data.num_classes is None:
      data = dataclasses.replace(data, num_classes=_count_classes(variables))
    options = dict(options)
    requested_size = options.pop("image_size", None)
    model = create_model(**{**_frozen(fill_from_data(config["model"], data)), **options})
    shape = data.shapes.get("image")
    trained_size = (int(shape[0]), int(shape[1])) if shape else getattr(model, "image_size", None)
    requested_size = None if requested_size is None else height_width(requested_size)
    run = cls(path, config, data, variables, model, trained_size, requested_size)
    is_other = run.size != trained_size or options.get("num_classes") is not None
    variables = _refitted(run) if is_other else _adapted(run)
    return _checked(dataclasses.replace(run, variables=variables))

  @property
  def size(self) -> Size | None:
    return self.requested_size or self.trained_size

  @property
  def task_name(self) -> str:
    return self.config["task"]["name"]

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
    transforms = build_transforms(self._evaluation().get("transforms", []))
    return tuple(t for t in transforms if not (t.is_target or t.name == "decode"))

  def prepare(self) -> Callable[[Image], Mapping[str, Any]]:
    """Returns the function from a user's image to an example of an evaluation."""
    size, transforms, preprocess = self.requested_size, self.transforms(), self.preprocess()
    preprocess = preprocess.at_size(size) if size else preprocess
    if self.config.get("preprocess"):
      return functools.partial(_prepare_published, preprocess)
    if size:
      transforms = tuple(t for t in transforms if not isinstance(t, Resize | CentralCrop))
    is_resized = any(hasattr(t, "size") or hasattr(t, "shorter") for t in transforms)
    needs_size = self.size is not None and not is_resized and preprocess.fit != "none"
    return functools.partial(_prepare_for_run, transforms, preprocess if needs_size else None)

  def preprocess(self) -> Preprocess:
    """Returns the evaluation's transforms as the preprocessing of a pretrained model."""
    if exported := self.config.get("preprocess"):  # of a published model with --format=orbax
      return Preprocess(**_frozen(exported))
    fields, task_class = self.task_fields(), tasks()[self.task_name]
    names = ("image_mean", "image_std")
    mean, std = (_frozen(fields.get(n, getattr(task_class, n, 0.5))) for n in names)
    target = self.trained_size or (224, 224)
    transforms: dict[type, Any] = {type(transform): transform for transform in self.transforms()}
    if (shorter := transforms.get(ResizeShorter)) is not None:
      side, limit = (int(np.ravel(shorter.shorter)[0]),) * 2, shorter.longest
      return Preprocess(side, mean, std, "shorter_side", "bilinear", max_side=limit)
    crop = transforms.get(CentralCrop)
    resizes = [transform for transform in self.transforms() if isinstance(transform, Resize)]
    if resizes:
      # A resize after the crop, as iGPT's, is one with the first: other pixels, the same region.
      first, last = resizes[0] if crop else resizes[-1], resizes[-1]
      before = height_width(first.size)
      after = height_width(crop.size) if crop else before
      kept = "crop" if crop else "shorter_side"
      fit = kept if isinstance(first, ResizeSmall) else "squash"
      return Preprocess(
        after if first is last else height_width(last.size), mean, std, fit,
        f"tf_{last.method}", crop_fraction(after, before), last.dtype == "uint8",
        rounding="nearest",
      )  # fmt: skip
    fit = "squash"
    if task_class.keeps_aspect_ratio:
      names = {spec["name"] for spec in self._evaluation().get("transforms", [])}
      # Padded images have any size.
      fit, target = "none" if "pad_label_map" in names else "shorter_side", (min(target),) * 2
    return Preprocess(target, mean, std, fit, "opencv", rounding="nearest")


def _frozen(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_frozen(item) for item in value)
  if isinstance(value, Mapping):
    return {key: _frozen(item) for key, item in value.items()}
  return value


def _count_classes(variables: Variables) -> int | None:
  head = variables["params"].get("head", {})
  return head["kernel"].shape[-1] if "kernel" in head else None


def _adapted(run: _Run) -> Variables:
  """Returns the run's variables in the model's layout; without the head if the model has none."""
  variables = run.variables
  if getattr(run.model, "num_classes", 0) is None:
    params = {k: v for k, v in variables["params"].items() if k != "head"}
    variables = {**variables, "params": params}
  return weights.relayout(variables, scan_layers=getattr(run.model, "scan_layers", None))


def _checked(run: _Run) -> _Run:
  """Returns the run; ValueError if its checkpoint is another model's, as when copied."""
  others = (family for system in systems().values() for family in system.several_inputs)
  shape = run.data.shapes.get("image", ())
  if len(shape) == 3 and family_of(run.model) not in others:
    images = jax.ShapeDtypeStruct((1, *(run.size or shape[:2]), shape[2]), np.float32)
    try:
      jax.eval_shape(run.model.apply, run.variables, images)
    except Exception as error:
      wrong = f"{run.path}: does not fit the model of its {CONFIG_FILE}"
      raise ValueError(f"{wrong} ({shorten(one_line(str(error)), 240)})") from error
  return run


def _refitted(run: _Run) -> Variables:
  if run.task_name != "classification":
    remedy = "image_size and num_classes can be changed for classifiers"
    raise ValueError(f"{run.path}: a run of {run.task_name}; {remedy}")
  model = run.model
  token_grid = getattr(model, "token_grid", None)
  if token_grid is None:  # only the head's shape differs
    variables, classes = _adapted(run), model.num_classes
    if classes in (None, _count_classes(variables)):
      return variables
    head = variables["params"].get("head", {})
    head = {k: np.zeros((*v.shape[:-1], classes), v.dtype) for k, v in head.items()}
    return {**variables, "params": {**variables["params"], "head": head}}
  images = jax.ShapeDtypeStruct((1, *(run.size or (224, 224)), 3), np.float32)
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  grids = [None if s is None else token_grid(s) for s in (run.trained_size, run.size)]
  return weights.fit_to_model(run.variables, fresh, run.path, source_grid=grids[0], grid=grids[1])
