"""Reading checkpoints: as a model that is ready to use, or into the variables of a given one."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Float

from vit_jax_zoo.data.tf_resize import tf_resize
from vit_jax_zoo.models.registry import check_fields
from vit_jax_zoo.models.vit import VisionTransformer
from vit_jax_zoo.weights import table, vit_npz

_POSITIONS = "position_embedding/table"


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Turns pictures into what a model takes, as the published accuracies were measured.

  Attributes:
    image_size: height and width. Pictures are resized straight to it, their aspect ratio ignored.
    mean: subtracted from pixels in [0, 1].
    std: divided by afterwards.
  """

  image_size: tuple[int, int]
  mean: float = 0.5
  std: float = 0.5

  def __call__(self, images: Sequence[np.ndarray]) -> Float[np.ndarray, "b h w c"]:
    """Stacks pictures, uint8 [h w 3] of any sizes, to one batch of float32."""
    resized = [tf_resize(np.asarray(image), *self.image_size) for image in images]
    return ((np.stack(resized) / 255 - self.mean) / self.std).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its weights.

  Attributes:
    model: the Linen module: `model.apply(variables, images)`.
    variables: `{"params": ...}`, float32 numpy arrays.
    preprocess: pictures -> images.
    config: the model's fields, and "image_size".
  """

  model: nn.Module
  variables: dict[str, Any]
  preprocess: Preprocess
  config: dict[str, Any]


def load_pretrained(
  path: str,
  *,
  image_size: int | tuple[int, int] | None = None,
  source_image_size: int | tuple[int, int] | None = None,
  resize: str = "corner_aligned",
  **overrides: Any,
) -> Pretrained:
  """Reads a published checkpoint; its sizes are inferred from its arrays.

  Args:
    path: a ViT .npz file of google-research/vision_transformer or big_vision.
    image_size: side, or height and width, of the images to come; the position embedding is resized
      to them. By default the size that the checkpoint was trained at.
    source_image_size: what it was trained at; needed only where that is not square.
    resize: how positions are resized, a key of `position_grid.METHODS`.
    **overrides: fields of the model. With another `num_classes` the head starts from zeros;
      `num_classes=None` drops it; `representation_size=None` drops `pre_logits`, and then the head,
      which was trained on its output, starts from zeros too.

  Raises:
    ValueError: the file is missing or in no known format, or does not fit (all of it is listed).
  """
  published = _read(path)
  check_fields(VisionTransformer, overrides, "VisionTransformer")
  fields = {**vit_npz.infer_fields(published, path), **overrides}
  model = VisionTransformer(**fields)
  stride = model.patch_side
  source_size, size = _height_width(source_image_size), _height_width(image_size)
  old_grid = None
  if vit_npz.position_key(published):
    old_grid = vit_npz.position_grid(
      published,
      path,
      given=source_size and _grid(source_size, stride),
      fallback=size and _grid(size, stride),
    )
    size = size or (old_grid[0] * stride, old_grid[1] * stride)
  size = size or source_size or (224, 224)
  abstract = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, _channels(published))))
  )
  new_grid = _grid(size, stride)
  if old_grid is not None:
    published = _fit_positions(published, abstract, old_grid, new_grid, resize)
  variables = _fit(path, published, abstract)
  return Pretrained(model, variables, Preprocess(size), {**fields, "image_size": size})


def load_into(
  path: str,
  variables: Mapping[str, Any],
  *,
  position_grid: tuple[int, int] | None = None,
  resize: str = "corner_aligned",
) -> dict[str, Any]:
  """Reads a published checkpoint into the variables of a model that exists already.

  Args:
    path: as in `load_pretrained`.
    variables: the model's, as arrays or as `jax.ShapeDtypeStruct`s. Only their shapes matter; but a
      head that the file cannot fill stays what it is here (zeros, if only its shape is known).
    position_grid: height and width, in tokens, of the model's grid; needed where that is not
      square, and the file's is another.
    resize: how positions are resized, a key of `position_grid.METHODS`.

  Returns:
    Variables of the same structure.

  Raises:
    ValueError: as in `load_pretrained`.
  """
  published = _read(path)
  key, positions = vit_npz.position_key(published), _flatten(variables).get(_POSITIONS)
  if key is not None and positions is not None:
    same = position_grid is None and positions.shape == published[key].shape
    if not same:
      grid = position_grid or _square(positions.shape[1], "cls_token" in variables["params"])
      old_grid = vit_npz.position_grid(published, path, fallback=grid)
      published = _fit_positions(published, variables, old_grid, grid, resize)
  return _fit(path, published, variables)


def _fit_positions(
  published: table.Flat,
  variables: Mapping[str, Any],
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  method: str,
) -> table.Flat:
  positions = _flatten(variables).get(_POSITIONS)
  if positions is None:
    return published
  return vit_npz.fit_positions(
    published,
    num_rows=positions.shape[1],
    old_grid=old_grid,
    new_grid=new_grid,
    method=method,
  )


def _fit(path: str, published: table.Flat, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Brings a file's arrays into the structure of `variables`."""
  target = _flatten(variables)
  published, kept = _fit_head(path, published, target)
  shapes = {key: leaf.shape for key, leaf in target.items() if key not in kept}
  layers = table.read(published, vit_npz.TABLE, table.unroll_shapes(shapes), source=path)
  params = {**table.stack(layers, shapes), **kept}
  params = {key: _like(params[key], target[key]) for key in target}
  return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


def _fit_head(
  path: str, published: table.Flat, target: Mapping[str, Any]
) -> tuple[table.Flat, dict[str, Any]]:
  """Drops what the model has no place for; returns the rest, and the head if it stays as it is."""
  published = dict(published)
  no_representation = "pre_logits/kernel" not in target and "pre_logits/kernel" in published
  if no_representation:
    del published["pre_logits/kernel"], published["pre_logits/bias"]
  wanted = target.get("head/bias")
  given = published.get("head/bias")
  if wanted is not None and given is not None:
    if wanted.shape == given.shape and not no_representation:
      return published, {}
    logging.info("%s: the head for %d classes starts afresh", path, wanted.shape[0])
  published = {key: array for key, array in published.items() if not key.startswith("head/")}
  head = {key: leaf for key, leaf in target.items() if key.startswith("head/")}
  return published, {
    key: np.zeros(leaf.shape, np.float32) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    for key, leaf in head.items()
  }


def _read(path: str) -> table.Flat:
  if not pathlib.Path(path).exists():
    raise ValueError(f"there is no checkpoint at {path}")
  if pathlib.Path(path).suffix != ".npz":
    raise ValueError(f"{path} is in no format that can be read; known: .npz (ViT)")
  return vit_npz.read_file(path)


def _like(array: Any, target: Any) -> Any:
  return array if isinstance(array, jax.Array) else np.asarray(array, dtype=target.dtype)


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(variables["params"], sep="/")


def _channels(published: Mapping[str, np.ndarray]) -> int:
  root = published.get("conv_root/kernel", published["embedding/kernel"])
  return root.shape[2]


def _height_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
  return (size, size) if isinstance(size, int) else size


def _grid(size: tuple[int, int], side: int) -> tuple[int, int]:
  return size[0] // side, size[1] // side


def _square(rows: int, has_cls: bool) -> tuple[int, int]:  # noqa: FBT001
  """Returns the square grid of a table, with or without a row for the class token."""
  for count in (rows - 1, rows) if has_cls else (rows,):
    if math.isqrt(count) ** 2 == count:
      return math.isqrt(count), math.isqrt(count)
  raise ValueError(
    f"the model has positions for {rows} tokens, which is no square grid; give position_grid"
  )
