"""Reading checkpoints: as a model that is ready to use, or into the variables of a given one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Float

from vit_jax_zoo.data.tf_resize import tf_resize
from vit_jax_zoo.models.registry import check_fields
from vit_jax_zoo.models.vit import VisionTransformer
from vit_jax_zoo.weights import table, vit_hf, vit_npz, vit_timm
from vit_jax_zoo.weights.checkpoint import POSITIONS, Checkpoint
from vit_jax_zoo.weights.torch_layouts import read_safetensors


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Turns pictures into what a model takes, as the published accuracies were measured.

  Attributes:
    image_size: height and width. Pictures are resized straight to it, their aspect ratio ignored.
    mean: subtracted from pixels in [0, 1]; one for each channel or for all.
    std: divided by afterwards; as `mean`.
  """

  image_size: tuple[int, int]
  mean: float | tuple[float, ...] = 0.5
  std: float | tuple[float, ...] = 0.5

  def __call__(self, images: Sequence[np.ndarray]) -> Float[np.ndarray, "b h w c"]:
    """Stacks pictures, uint8 [h w 3] of any sizes, to one batch of float32."""
    resized = [tf_resize(np.asarray(image), *self.image_size) for image in images]
    mean, std = np.asarray(self.mean), np.asarray(self.std)
    return ((np.stack(resized) / 255 - mean) / std).astype(np.float32)


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
  resize: str | None = None,
  **overrides: Any,
) -> Pretrained:
  """Reads a published checkpoint; its sizes are inferred from its arrays.

  Args:
    path: a ViT .npz file of google-research/vision_transformer or big_vision, a .safetensors file
      of timm's, or a folder of Hugging Face's with `config.json` and `model.safetensors`; local or
      `gs://bucket/...` (which needs gcsfs, and was not tried against a real bucket here).
    image_size: side, or height and width, of the images to come; the position embedding is resized
      to them. By default the size that the checkpoint was trained at.
    source_image_size: what it was trained at; needed only where that is not square and the file
      does not state it.
    resize: how positions are resized, a key of `position_grid.METHODS`; None: as the code does it
      that the checkpoint was published for.
    **overrides: fields of the model. With another `num_classes` the head starts from zeros;
      `num_classes=None` drops it; `representation_size=None` drops `pre_logits`, and then the head,
      which was trained on its output, starts from zeros too. timm's files do not say how many
      heads there are: see `vit_timm`, and give `num_heads` where that is wrong.

  Raises:
    ValueError: the file is missing or in no known format, or does not fit (all of it is listed).
  """
  checkpoint = _read(path)
  check_fields(VisionTransformer, overrides, "VisionTransformer")
  fields = {**checkpoint.fields, **overrides}
  model = VisionTransformer(**fields)
  stride = model.patch_side
  size = _height_width(image_size)
  source_size = _height_width(source_image_size) or checkpoint.image_size
  old_grid = None
  if checkpoint.key(POSITIONS):
    old_grid = checkpoint.position_grid(
      given=source_size and _grid(source_size, stride),
      fallback=size and _grid(size, stride),
    )
    size = size or (old_grid[0] * stride, old_grid[1] * stride)
  size = size or source_size or (224, 224)
  images = jnp.zeros((1, *size, _channels(checkpoint)))
  abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
  if old_grid is not None:
    checkpoint = _fit_positions(checkpoint, abstract, old_grid, _grid(size, stride), resize)
  preprocess = Preprocess(size, checkpoint.mean, checkpoint.std)
  return Pretrained(model, _fit(checkpoint, abstract), preprocess, {**fields, "image_size": size})


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
      head that the file cannot fill stays what it is here (zeros, if only its shape is known).
    position_grid: height and width, in tokens, of the model's grid; needed where that is not
      square, and the file's is another.
    resize: as in `load_pretrained`.

  Returns:
    Variables of the same structure.

  Raises:
    ValueError: as in `load_pretrained`.
  """
  checkpoint = _read(path)
  theirs, positions = checkpoint.array(POSITIONS), _flatten(variables).get(POSITIONS)
  if theirs is not None and positions is not None:
    same = position_grid is None and positions.shape == theirs.shape
    if not same:
      grid = position_grid or _square(positions.shape[1], "cls_token" in variables["params"])
      old_grid = checkpoint.position_grid(fallback=grid)
      checkpoint = _fit_positions(checkpoint, variables, old_grid, grid, resize)
  return _fit(checkpoint, variables)


def _fit_positions(
  checkpoint: Checkpoint,
  variables: Mapping[str, Any],
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  method: str | None,
) -> Checkpoint:
  positions = _flatten(variables).get(POSITIONS)
  if positions is None:
    return checkpoint
  return checkpoint.fit_positions(
    num_rows=positions.shape[1], old_grid=old_grid, new_grid=new_grid, method=method
  )


def _fit(checkpoint: Checkpoint, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Brings a file's arrays into the structure of `variables`."""
  target = _flatten(variables)
  checkpoint, kept = _fit_head(checkpoint, target)
  shapes = {key: leaf.shape for key, leaf in target.items() if key not in kept}
  layers = table.read(
    checkpoint.arrays,
    checkpoint.table,
    table.unroll_shapes(shapes),
    source=checkpoint.source,
    ignore=checkpoint.ignore,
  )
  params = {**table.stack(layers, shapes), **kept}
  params = {key: _like(params[key], target[key]) for key in target}
  return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


def _fit_head(
  checkpoint: Checkpoint, target: Mapping[str, Any]
) -> tuple[Checkpoint, dict[str, Any]]:
  """Drops what the model has no place for; returns the rest, and the head if it stays as it is."""
  no_representation = False
  if "pre_logits/kernel" not in target and checkpoint.key("pre_logits/kernel"):
    checkpoint, no_representation = checkpoint.without("pre_logits"), True
  wanted, given = target.get("head/bias"), checkpoint.array("head/bias")
  if wanted is not None and given is not None:
    if wanted.shape == given.shape and not no_representation:
      return checkpoint, {}
    logging.info("%s: the head for %d classes starts afresh", checkpoint.source, wanted.shape[0])
  head = {key: leaf for key, leaf in target.items() if key.startswith("head/")}
  return checkpoint.without("head"), {
    key: np.zeros(leaf.shape, np.float32) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    for key, leaf in head.items()
  }


def _read(path: str) -> Checkpoint:
  """Reads a checkpoint in whatever format it is."""
  file = epath.Path(path)
  if not file.exists():
    raise ValueError(f"there is no checkpoint at {path}")
  if file.is_dir():
    file = file / "model.safetensors"
    if not file.exists():
      raise ValueError(f"there is no model.safetensors in {path}")
  if file.suffix == ".npz":
    return vit_npz.read_checkpoint(path)
  if file.suffix != ".safetensors":
    raise ValueError(
      f"{path} is in no format that can be read; known: .npz, .safetensors, Hugging Face's folders"
    )
  published = read_safetensors(str(file))
  for module in (vit_hf, vit_timm):
    if module.is_of(published):
      return module.read_checkpoint(str(file), published)
  keys = ", ".join(sorted(published)[:3])
  raise table.WeightsError(
    f"{path} holds no ViT in timm's or Hugging Face's layout; its keys begin with {keys}"
  )


def _like(array: Any, target: Any) -> Any:
  return array if isinstance(array, jax.Array) else np.asarray(array, dtype=target.dtype)


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(variables["params"], sep="/")


def _channels(checkpoint: Checkpoint) -> int:
  """Returns the channels of the images: what the first layer's kernel, in our layout, takes."""
  for row in checkpoint.table:
    if row.ours in ("resnet/root_conv/kernel", "embedding/kernel"):
      array = checkpoint.arrays.get(row.published)
      if array is not None:
        return row.transform.read(array, ()).shape[2]
  return 3


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
