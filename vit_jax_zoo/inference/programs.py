"""Exports a model as a program, for any batch size, that runs without this package."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax_zoo.inference.load import task_of
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.tasks import tasks
from vit_jax_zoo.weights import Pretrained

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO_FILE, NOTES_FILE = "model.stablehlo", "model.json"
MAX_STABLEHLO = 2_000_000_000  # bytes; 2 GiB is the maximum size of a protocol buffer


def write_stablehlo(pretrained: Pretrained, path: str) -> None:
  """Writes the model as a program for any batch size, with weights and normalisation.

  `jax.export.deserialize(content).call(images)` takes float32 [b h w c] in [0, 255]; a detector's
  also `image_size` int32 [b 2], height and width without the padding, and returns detections.
  `model.json` has the shapes, and the preprocessing before the call.
  """
  size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pretrained.variables))
  if size > MAX_STABLEHLO:
    raise ValueError(f"weights: {size / 1e9:.1f} GB; expected at most 2. Use --format=orbax")
  preprocess = pretrained.preprocess
  is_detector = bool(pretrained.task) and tasks()[pretrained.task].predicts_boxes
  shape = (*jax.export.symbolic_shape("b"), *program_size(pretrained), preprocess.channels)
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32)]
  if is_detector:
    arguments.append(jax.ShapeDtypeStruct((shape[0], 2), jnp.int32))
  program = _detector(pretrained) if is_detector else _program(pretrained)
  exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(*arguments)
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / STABLEHLO_FILE).write_bytes(bytes(exported.serialize()))
  leaves = exported.out_tree.unflatten(exported.out_avals)
  outputs = {
    jax.tree_util.keystr(key, simple=True, separator="/"): [*map(str, leaf.shape), leaf.dtype.name]
    for key, leaf in jax.tree_util.tree_leaves_with_path(leaves)
  }
  notes = {
    "images": [*map(str, shape), "float32 in [0, 255]"],
    "outputs": outputs,
    "platforms": list(PLATFORMS),
    "class_names": list(pretrained.class_names),
    "preprocess": plain(dataclasses.asdict(preprocess)),
    "steps": preprocessing_steps(pretrained),
  }
  if is_detector:
    notes["image_size"] = ["b", "2", "int32, height and width without the padding"]
  (folder / NOTES_FILE).write_text(json.dumps(notes, indent=1) + "\n")


def program_size(pretrained: Pretrained) -> tuple[int, int]:
  """Returns height and width of the program's images, the largest that preprocessing returns."""
  preprocess = pretrained.preprocess
  if preprocess.pad_size:
    return preprocess.pad_size
  if preprocess.fit == "shorter_side" and preprocess.max_side:
    side = -(-preprocess.max_side // 32) * 32  # rounding may exceed `max_side`
    return side, side
  height, width = pretrained.config.get("image_size") or preprocess.image_size
  return height, width


def preprocessing_steps(pretrained: Pretrained) -> list[str]:
  """Returns the preprocessing in words."""
  preprocess = pretrained.preprocess
  is_detector = bool(pretrained.task) and tasks()[pretrained.task].predicts_boxes
  (height, width), (rows, columns) = preprocess.image_size, preprocess.uncropped_size
  limit = f", the longer at most {preprocess.max_side}" if preprocess.max_side else ""
  crop = f" and crop the centre, {height} x {width}"
  goal = f"the shorter side to {rows}" if rows == columns else f"to cover {rows} x {columns}"
  resize = {
    "none": "do not resize",
    "squash": f"resize to {rows} x {columns}{crop if rows > height or columns > width else ''}",
    "inside": f"resize with the aspect ratio kept to the largest size inside of {height} x {width}",
    "shorter_side": f"resize with the aspect ratio kept, the shorter side to {height}{limit}",
    "crop": f"resize with the aspect ratio kept, {goal}{crop}",
  }[preprocess.fit]
  name = preprocess.interpolation.removeprefix("tf_")
  library = "Pillow" if name == preprocess.interpolation else "TensorFlow"
  filters = {"opencv": "OpenCV's bilinear filter, antialiased"}
  steps = [f"{resize}, with {filters.get(name, f'the {name} filter of {library}')}"]
  if is_detector:
    padded = " x ".join(map(str, program_size(pretrained)))
    steps.append(f"pad at the right and bottom to {padded}, with any value")
  return [
    *steps,
    f"in the program: image / 255, minus mean {preprocess.means}, divided by std {preprocess.stds}",
    *(["boxes_xyxy: in pixels of the resized image without its padding"] if is_detector else []),
  ]


def _program(pretrained: Pretrained) -> Any:
  model, preprocess = pretrained.model, pretrained.preprocess
  variables = jax.tree.map(jnp.asarray, pretrained.variables)

  def program(images: Any) -> Any:
    return model.apply(variables, normalize_images(images, preprocess.mean, preprocess.std))

  return program


def _detector(pretrained: Pretrained) -> Any:
  task = task_of(pretrained)
  if not pretrained.preprocess.pad_size:  # otherwise the model was trained with this padding
    task = task.padding_invariant()
  variables = jax.tree.map(jnp.asarray, pretrained.variables)

  def detect(example: dict[str, Any]) -> Any:
    batch = jax.tree.map(lambda x: x[None], example)
    return jax.tree.map(lambda x: x[0], task.predict(variables, batch))

  def program(images: Any, image_size: Any) -> Any:
    # One image at a time: R-CNN needs static shapes, and the batch size is symbolic here.
    return jax.lax.map(detect, {"image": images, "image_size": image_size})

  return program


def plain(value: Any) -> Any:
  """Returns a value as JSON represents it; dtypes by their name."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, str | int | float | None):
    return value
  return [plain(v) for v in value] if isinstance(value, list | tuple) else np.dtype(value).name
