"""Reading published checkpoints: as a model that is ready, or into the variables of a given one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import linen as nn
from flax import traverse_util

from vit_jax_zoo.errors import check_names, field_names
from vit_jax_zoo.registry import model_classes
from vit_jax_zoo.weights import hub
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.checkpoint import Checkpoint
from vit_jax_zoo.weights.formats import read_checkpoint
from vit_jax_zoo.weights.preprocess import Preprocess


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its weights.

  Attributes:
    model: the Linen module: `model.apply(variables, images)`.
    variables: `{"params": ..., ...}`, numpy arrays.
    preprocess: pictures -> images.
    config: the model's fields, and "image_size".
    task: what the weights were trained for, a key of `tasks.TASKS`; "" of a part of a network.
    task_fields: of that task, where the file knows them: `class_names`, ...
  """

  model: nn.Module
  variables: dict[str, Any]
  preprocess: Preprocess
  config: dict[str, Any]
  task: str = "classification"
  task_fields: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def class_names(self) -> tuple[str, ...]:
    """The names of the classes in order; none where the file does not tell."""
    return tuple(self.task_fields.get("class_names") or ())


def load_pretrained(
  path: str,
  *,
  image_size: int | tuple[int, int] | None = None,
  source_image_size: int | tuple[int, int] | None = None,
  resize: str | None = None,
  **overrides: Any,
) -> Pretrained:
  """Reads a published checkpoint; its sizes are inferred from its arrays.

  Args:
    path: a file or folder in any of `formats.FORMATS`, local or `gs://bucket/...` (which needs
      gcsfs, and was not tried against a real bucket here); a published name such as
      "vit_b16_imagenet21k", a URL, or "owner/name" on Hugging Face's hub: see `hub.resolve`.
    image_size: side, or height and width, of the images to come; positions on a grid are resized
      to them. By default the size that the checkpoint was trained at.
    source_image_size: what it was trained at; needed only where that is not square and the file
      does not state it.
    resize: how positions are resized, a key of `position_grid.METHODS`; None: as the code does it
      that the checkpoint was published for.
    **overrides: fields of the model. With another `num_classes` the head starts from zeros;
      `num_classes=None` drops it; a ViT's `representation_size=None` drops `pre_logits`, and then
      the head, which was trained on its output, starts from zeros too. timm's files do not say how
      many heads there are: see `vit_timm`, and give `num_heads` where that is wrong.

  Raises:
    ValueError: the file is missing or in no known format, or does not fit (all of it is listed).
    ImportError: reading it takes a package that is not installed.
    OSError: it is to be downloaded, and cannot be.
  """
  checkpoint = read_checkpoint(hub.resolve(path))
  kind = model_classes()[checkpoint.family]
  check_names(f"field of {kind.__name__}", overrides, field_names(kind))
  model = kind(**{**checkpoint.fields, **overrides})
  size, checkpoint = checkpoint.choose_size(
    model, _height_width(image_size), _height_width(source_image_size)
  )
  fields = {**checkpoint.fields, **overrides}  # the size may have determined some of them
  model = kind(**fields)
  inputs = checkpoint.example_inputs(size)
  abstract = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)
  checkpoint = checkpoint.at_size(flatten_variables(abstract), model, size, method=resize)
  abstract = {k: v for k, v in abstract.items() if k not in _left_alone(checkpoint, abstract)}
  return Pretrained(
    model,
    _fit(checkpoint, abstract),
    checkpoint.preprocess.at_size(size).with_channels(checkpoint.image_channels),
    {**fields, "image_size": size},
    task=checkpoint.task,
    task_fields=_task_fields(checkpoint, fields),
  )


def _task_fields(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the task's fields, without names of classes that a new head does not have."""
  known = dict(checkpoint.task_fields)
  names = known.get("class_names")
  if names and len(names) != fields.get("num_classes", len(names)):
    del known["class_names"]
  return known


def load_into(
  path: str,
  variables: Mapping[str, Any],
  *,
  position_grid: tuple[int, int] | None = None,
  resize: str | None = None,
) -> dict[str, Any]:
  """Reads a published checkpoint into the variables of a model that exists already.

  Args:
    path: as in `load_pretrained`.
    variables: the model's, as arrays or as `jax.ShapeDtypeStruct`s. Only their shapes matter; but a
      head that the file cannot fill, and whole collections of which it has nothing (a palette),
      keep the values given here (zeros, if only their shapes are known). Where a task trains the
      model beside other networks (`Checkpoint.trained_network`), only the model's are read.
    position_grid: height and width, in tokens, of the model's grid; needed where that is not
      square, and the file's is another.
    resize: as in `load_pretrained`.

  Returns:
    Variables of the same structure.

  Raises:
    ValueError: as in `load_pretrained`.
  """
  checkpoint = read_checkpoint(hub.resolve(path))
  checkpoint = checkpoint.fit_positions_to(flatten_variables(variables), position_grid, resize)
  network = checkpoint.trained_network
  if network and network in variables["params"]:
    inner = _fit(checkpoint, {"params": variables["params"][network]})["params"]
    return {**variables, "params": {**variables["params"], network: inner}}
  return _fit(checkpoint, variables)


def _fit(checkpoint: Checkpoint, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Brings a file's arrays into the structure of `variables`."""
  target = flatten_variables(variables)
  checkpoint, kept = _fit_heads(checkpoint, target)
  for name in _left_alone(checkpoint, variables):
    if name in checkpoint.optional:
      logging.warning("%s holds no %s: that of the run stays", checkpoint.source, name)
    kept |= {key: _fresh(leaf) for key, leaf in target.items() if key.startswith(f"{name}/")}
  shapes = {key: leaf.shape for key, leaf in target.items() if key not in kept}
  layers = table.read(
    checkpoint.arrays,
    checkpoint.table,
    table.unroll_shapes(shapes),
    source=checkpoint.source,
    ignore=checkpoint.ignore,
  )
  fitted = {**table.stack(layers, shapes), **kept}
  return unflatten_variables({key: _like(fitted[key], target[key]) for key in target}, variables)


def _fit_heads(
  checkpoint: Checkpoint, target: Mapping[str, Any]
) -> tuple[Checkpoint, dict[str, Any]]:
  """Drops what the model has no place for; returns the rest, and heads that stay as they are."""
  kept: dict[str, Any] = {}
  was_trained_on_another = False
  for prefix in checkpoint.below_heads:
    if checkpoint.has(prefix) and not any(key.startswith(prefix) for key in target):
      checkpoint, was_trained_on_another = checkpoint.without(prefix), True
  for prefix in checkpoint.heads:
    wanted = {key: leaf for key, leaf in target.items() if key.startswith(prefix)}
    if wanted and checkpoint.has(prefix) and not was_trained_on_another:
      if all(_outputs(checkpoint, key, leaf) == leaf.shape[-1] for key, leaf in wanted.items()):
        continue
      logging.info("%s: %s starts afresh", checkpoint.source, prefix.rstrip("/"))
    checkpoint = checkpoint.without(prefix)
    kept |= {key: _fresh(leaf) for key, leaf in wanted.items()}
  return checkpoint, kept


def _outputs(checkpoint: Checkpoint, path: str, leaf: Any) -> int:
  """Returns how many classes the file has for a head's parameter, or those of the model.

  Only the number of classes may differ: whatever else is wrong with a head must be reported.
  """
  bias = checkpoint.array(f"{path.rpartition('/')[0]}/bias")
  if bias is not None and bias.ndim == 1:
    return bias.shape[0]
  ours = checkpoint.ours(path, leaf.shape)
  return leaf.shape[-1] if ours is None or ours.ndim != len(leaf.shape) else ours.shape[-1]


def _left_alone(checkpoint: Checkpoint, variables: Mapping[str, Any]) -> list[str]:
  """Returns the collections that stay as they are: the file does not have them, and need not."""
  rows = [row.ours for row in checkpoint.table]
  return [
    name
    for name in variables
    if name != "params"
    and not checkpoint.has(f"{name}/")
    and (name in checkpoint.optional or not any(ours.startswith(f"{name}/") for ours in rows))
  ]


def flatten_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves by path as tables have it: those of `params` without the collection."""
  flat = dict(traverse_util.flatten_dict(variables["params"], sep="/"))
  for name, tree in variables.items():
    if name != "params":
      leaves = traverse_util.flatten_dict(tree, sep="/")
      flat |= {f"{name}/{path}": leaf for path, leaf in leaves.items()}
  return flat


def unflatten_variables(flat: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of leaves by path; which collections there are is seen from `like`."""
  trees: dict[str, dict[str, Any]] = {name: {} for name in like}
  for path, leaf in flat.items():
    name, _, rest = path.partition("/")
    is_other = name in like and name != "params"
    trees[name if is_other else "params"][rest if is_other else path] = leaf
  return {name: traverse_util.unflatten_dict(leaves, sep="/") for name, leaves in trees.items()}


def _fresh(leaf: Any) -> Any:
  return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _like(array: Any, target: Any) -> Any:
  return array if isinstance(array, jax.Array) else np.asarray(array, dtype=target.dtype)


def _height_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
  return (size, size) if isinstance(size, int) else size
