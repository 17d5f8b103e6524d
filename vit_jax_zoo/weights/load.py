"""Reads published checkpoints, into a new model or into the variables of an existing one.

A system registers its formats (`registry.Format`). A format's module or class has three functions:

* `is_of(arrays) -> bool`: whether a file with these keys has this format;
* `read_checkpoint(published) -> Checkpoint`: from what `readers.read_published` returns;
* `write_checkpoint(path, export)`: the inverse, a file or folder at `path`; WeightsError where the
  format has no such model. A format that can only be read has none.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.errors import check_fields
from vit_jax_zoo.registry import Format, load_reference, model_classes, systems
from vit_jax_zoo.weights import hub, key_map
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import WeightsError
from vit_jax_zoo.weights.readers import read_published


@functools.cache
def formats() -> dict[Format, Any]:
  """Returns the formats of all systems with their modules, in the order in which they are tried."""
  return {
    form: load_reference(name, form.module)
    for name, system in systems().items()
    for form in system.formats
  }


def read_checkpoint(path: str) -> Checkpoint:
  """Reads a published file or folder of any registered format, or raises WeightsError."""
  published = read_published(path)
  found = next((item for item in formats().items() if item[1].is_of(published.arrays)), None)
  if found is None:
    keys = ", ".join(sorted(published.arrays)[:3]) or "none"
    known = ", ".join(dict.fromkeys(form.description for form in formats()))
    raise WeightsError(f"{path} holds no weights of {known}; its keys begin with {keys}")
  form, module = found
  try:
    return module.read_checkpoint(published)
  except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
    # Raised where sizes are inferred from missing or misshapen arrays.
    what = f"no {error}" if isinstance(error, KeyError) else f"a wrong shape somewhere ({error})"
    raise WeightsError(
      f"{path} looks like {form.description}, but its sizes cannot be inferred: there is {what}"
    ) from None


def writable_formats(family: str) -> dict[str, Any]:
  """Returns the modules of the formats in which a model family can be written, by format name."""
  return {
    form.name: module
    for form, module in formats().items()
    if form.family == family and hasattr(module, "write_checkpoint")
  }


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
    path: a file or folder in any registered format, local or `gs://bucket/...` (needs gcsfs; not
      tested with a real bucket); a published name such as "vit_b16_imagenet21k"; a URL; or
      "owner/name" on the Hugging Face hub: see `hub.resolve`, also for its errors.
    image_size: side, or height and width, of the images; position embeddings on a grid are
      interpolated. By default the training size.
    source_image_size: training size, if it is not square and the file does not state it.
    resize: interpolation of positions, a key of `ops.resize.METHODS`; None: the publisher's.
    **overrides: fields of the model. If `num_classes` differs, the head is zero-initialised;
      `num_classes=None` drops it. Without a layer of the file below the head, the head is
      zero-initialised, too. timm's files do not state `num_heads`; give it if it is inferred wrong.

  Raises ValueError if the file is in no known format or does not fit, ImportError if a package
  needed for reading is not installed.
  """
  checkpoint = read_checkpoint(hub.resolve(path))
  kind = model_classes()[checkpoint.family]
  check_fields(kind.__name__, kind, overrides)
  check_fields(f"{checkpoint.source}: wrong type", kind, checkpoint.fields)
  model = kind(**{**checkpoint.fields, **overrides})
  sizes = (image_size, source_image_size)
  requested, trained = ((size, size) if isinstance(size, int) else size for size in sizes)
  size, checkpoint = checkpoint.choose_size(model, requested, trained)
  fields = {**checkpoint.fields, **overrides}  # some fields depend on the image size
  model = kind(**fields)
  inputs = checkpoint.example_inputs(size)
  abstract = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)
  checkpoint = checkpoint.at_size(flatten_variables(abstract), model, size, method=resize)
  abstract = {k: v for k, v in abstract.items() if k not in _left_alone(checkpoint, abstract)}
  task_fields = dict(checkpoint.task_fields)
  names, count = task_fields.get("class_names"), fields.get("num_classes")
  if names and count != checkpoint.fields.get("num_classes"):  # those of another head
    del task_fields["class_names"]
  elif names and count and count != len(names):
    text = "%s: %d class names, expected %d; missing ones are the ids"
    logging.warning(text, checkpoint.source, len(names), count)
    task_fields["class_names"] = (*names[:count], *map(str, range(len(names), count)))
  return Pretrained(
    model,
    _fit(checkpoint, abstract),
    checkpoint.preprocess.at_size(size).with_channels(checkpoint.image_channels),
    {**fields, "image_size": size},
    task=checkpoint.task,
    task_fields=task_fields,
  )


def load_into(
  path: str,
  variables: Mapping[str, Any],
  *,
  position_grid: tuple[int, int] | None = None,
  resize: str | None = None,
) -> dict[str, Any]:
  """Returns the variables of an existing model, read from a published checkpoint.

  Heads and collections that the file lacks (a palette) keep their values from `variables`, arrays
  or `jax.ShapeDtypeStruct`s (zeros then). Of a task's several networks only the model is read.
  `position_grid` is the model's height and width in tokens, needed if it is not square and differs
  from the file's. `path`, `resize` and the errors are those of `load_pretrained`.
  """
  checkpoint = read_checkpoint(hub.resolve(path))
  checkpoint = checkpoint.fit_positions_to(flatten_variables(variables), position_grid, resize)
  if (network := checkpoint.trained_network) and network in variables["params"]:
    inner = _fit(checkpoint, {"params": variables["params"][network]})["params"]
    return {**variables, "params": {**variables["params"], network: inner}}
  return _fit(checkpoint, variables)


def _fit(checkpoint: Checkpoint, variables: Mapping[str, Any]) -> dict[str, Any]:
  target = flatten_variables(variables)
  checkpoint, kept = _fit_heads(checkpoint, target)
  for name in _left_alone(checkpoint, variables):
    if name in checkpoint.optional:
      logging.warning("%s: no %s; the run's initial values are kept", checkpoint.source, name)
    kept |= {key: _fresh(leaf) for key, leaf in target.items() if key.startswith(f"{name}/")}
  shapes = {key: leaf.shape for key, leaf in target.items() if key not in kept}
  given, unrolled = (checkpoint.arrays, checkpoint.table), key_map.unroll_shapes(shapes)
  layers = key_map.read(*given, unrolled, source=checkpoint.source, ignore=checkpoint.ignore)
  fitted = {**key_map.stack(layers, shapes), **kept}
  arrays = {
    key: x if isinstance(x := fitted[key], jax.Array) else np.asarray(x, dtype=leaf.dtype)
    for key, leaf in target.items()
  }
  return unflatten_variables(arrays, variables)


def _fit_heads(
  checkpoint: Checkpoint, target: Mapping[str, Any]
) -> tuple[Checkpoint, dict[str, Any]]:
  """Drops arrays that the model lacks; returns the rest, and the heads that are not loaded."""
  kept: dict[str, Any] = {}
  was_trained_on_another = False
  for prefix in checkpoint.below_heads:
    if checkpoint.has(prefix) and not any(key.startswith(prefix) for key in target):
      checkpoint, was_trained_on_another = checkpoint.without(prefix), True
  for prefix in checkpoint.heads:
    head = {key: leaf for key, leaf in target.items() if key.startswith(prefix)}
    if head and checkpoint.has(prefix) and not was_trained_on_another:
      if all(_outputs(checkpoint, key, leaf) == leaf.shape[-1] for key, leaf in head.items()):
        continue
      logging.info("%s: not loaded, newly initialised: %s", checkpoint.source, prefix.rstrip("/"))
    checkpoint = checkpoint.without(prefix)
    kept |= {key: _fresh(leaf) for key, leaf in head.items()}
  return checkpoint, kept


def _outputs(checkpoint: Checkpoint, path: str, leaf: Any) -> int:
  """Returns the file's number of classes for a head's parameter, the only size that may differ."""
  bias = checkpoint.array(f"{path.rpartition('/')[0]}/bias")
  if bias is not None and bias.ndim == 1:
    return bias.shape[0]
  ours = checkpoint.ours(path, leaf.shape)
  return leaf.shape[-1] if ours is None or ours.ndim != len(leaf.shape) else ours.shape[-1]


def _left_alone(checkpoint: Checkpoint, variables: Mapping[str, Any]) -> list[str]:
  needed = {row.ours.partition("/")[0] for row in checkpoint.table} - {*checkpoint.optional}
  needed.add("params")
  return [x for x in variables if x not in needed and not checkpoint.has(f"{x}/")]


def flatten_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves by path as in tables: those of `params` without the collection."""
  flat = traverse_util.flatten_dict(dict(variables), sep="/")
  return {path.removeprefix("params/"): leaf for path, leaf in flat.items()}


def unflatten_variables(flat: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of leaves by path, with the collections of `like`."""
  others = tuple(f"{name}/" for name in like if name != "params")
  flat = {
    path if path.startswith(others) else f"params/{path}": leaf for path, leaf in flat.items()
  }
  return {**{name: {} for name in like}, **traverse_util.unflatten_dict(flat, sep="/")}


def _fresh(leaf: Any) -> Any:
  return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
