"""Exports a model as a program, for any batch size, that runs without this package."""

import dataclasses
import json
import logging as python_logging
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float, UInt8

from vit_jax_zoo.data.images import AREA_FROM, BLUR_FROM
from vit_jax_zoo.inference.load import task_of
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.tasks import tasks
from vit_jax_zoo.weights import Preprocess, Pretrained, relayout

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO_FILE, ONNX_FILE, NOTES_FILE = "model.stablehlo", "model.onnx", "model.json"
MAX_BYTES = 2_000_000_000  # 2 GiB is the maximum size of a protocol buffer


def make_program(
  pretrained: Pretrained, *, with_preprocessing: bool = False, one_by_one: bool = True
) -> tuple[Any, Any, Any]:
  """Returns a model with its normalisation as a function, its arguments by name, and model.json.

  `images` [b h w c] are float32 in [0, 255], of one size; a detector's `image_size` int32 [b 2] is
  height and width without the padding. `with_preprocessing`: only `images`, uint8 RGB of any size,
  and boxes in their pixels; ValueError where resized images have several sizes. `one_by_one`:
  detectors take one image at a time.
  """
  size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pretrained.variables))
  if size > MAX_BYTES:
    raise ValueError(f"weights: {size / 1e9:.1f} GB; expected at most 2. Use --format=orbax")
  preprocess, dtype, kind = pretrained.preprocess, jnp.float32, "float32 in [0, 255]"
  is_detector = bool(pretrained.task) and tasks()[pretrained.task].predicts_boxes
  shape = (*jax.export.symbolic_shape("b"), *program_size(pretrained), preprocess.channels)
  function = _detector(pretrained, one_by_one=one_by_one) if is_detector else _program(pretrained)
  if with_preprocessing:
    if preprocess.fit == "none" or not (preprocess.has_fixed_size or is_detector):
      wrong = f"--with_preprocessing: fit={preprocess.fit} of {type(pretrained.model).__name__}"
      raise ValueError(f"{wrong}; expected images of one size. Resize by the steps in model.json")
    names = jax.export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"])
    shape, dtype, kind = (*names, 3), jnp.uint8, "uint8, RGB"
    function = _preprocessed(function, pretrained, is_detector=is_detector)
  arguments = {"images": jax.ShapeDtypeStruct(shape, dtype)}
  notes = {
    "images": [*map(str, shape), kind],
    "class_names": list(pretrained.class_names),
    "preprocess": plain(dataclasses.asdict(preprocess)),
    "in_program" if with_preprocessing else "steps": preprocessing_steps(pretrained),
  }
  if is_detector:
    for note in padding_notes(pretrained):
      logging.warning("%s", note)
    notes["boxes_xyxy"] = f"in pixels of the {'given' if with_preprocessing else 'resized'} image"
  if is_detector and not with_preprocessing:
    arguments["image_size"] = jax.ShapeDtypeStruct((shape[0], 2), jnp.int32)
    notes["image_size"] = ["b", "2", "int32, height and width without the padding"]
  return function, arguments, notes


def write_stablehlo(pretrained: Pretrained, path: str, **options: Any) -> None:
  """Writes a program that `jax.export.deserialize` reads, and model.json; see `make_program`."""
  function, arguments, notes = make_program(pretrained, **options)
  exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments.values())
  outputs = exported.out_tree.unflatten(exported.out_avals)
  notes["platforms"] = list(PLATFORMS)
  _save(path, STABLEHLO_FILE, bytes(exported.serialize()), notes, outputs)


def write_onnx(pretrained: Pretrained, path: str, **options: Any) -> None:
  """Writes model.onnx and model.json; ValueError if jax2onnx cannot convert the model."""
  try:
    for name in ("jax2onnx", "onnx_ir"):  # warn of optional imports and of values without type
      python_logging.getLogger(name).setLevel("ERROR")
    jax2onnx, helper, runtime = map(import_module, ("jax2onnx", "onnx.helper", "onnxruntime"))
  except ImportError:
    fix = "pip install -e '.[onnx]' && pip install --no-deps jax2onnx"
    raise ImportError(f"--format=onnx: needs jax2onnx, onnx and onnxruntime; {fix}") from None
  if hasattr(pretrained.model, "scan_layers"):
    model = pretrained.model.clone(scan_layers=False)
    variables = relayout(pretrained.variables, scan_layers=False)
    pretrained = dataclasses.replace(pretrained, model=model, variables=variables)
  function, arguments, notes = make_program(pretrained, one_by_one=False, **options)
  try:
    # Traced here: jax2onnx replaces functions of JAX and Flax while it traces, some of them wrong.
    jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(*arguments.values())
    flat = lambda *inputs: tuple(jaxpr_as_fun(jaxpr)(*inputs))  # noqa: E731
    names = {"input_names": list(arguments), "output_names": list(by_name(outputs))}
    # jax2onnx copies operations with their dimensions' scope, which JAX cannot copy.
    scope = jax.export.SymbolicScope
    with mock.patch.object(scope, "__deepcopy__", lambda same, _: same, create=True):
      converted = jax2onnx.to_onnx(flat, [*arguments.values()], return_mode="proto", **names)
    _pool_two_axes(converted.graph, helper)
    content = converted.SerializeToString()
    runtime.InferenceSession(content)  # raises for a graph that it cannot run
  except Exception as error:  # the converter raises any class
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    wrong = f"--format=onnx: {type(pretrained.model).__name__} cannot be converted ({reason})"
    raise ValueError(f"{wrong}; use --format=stablehlo") from None
  _save(path, ONNX_FILE, content, notes, outputs)


def _pool_two_axes(graph: Any, helper: Any) -> None:
  """Replaces jax2onnx's pools of all axes of [1 1 b h w c], by those of [b c h w]."""
  for i, node in enumerate(graph.node):
    attributes = {a.name: a.ints for a in node.attribute}
    if node.op_type == "MaxPool" and len(attributes["kernel_shape"]) == 4:
      first, second, squeeze = (graph.node[i + k] for k in (-2, -1, 1))
      for other, order in ((first, (0, 3, 1, 2)), (squeeze, (0, 2, 3, 1))):
        other.CopyFrom(helper.make_node("Transpose", other.input[:1], other.output, perm=order))
      second.CopyFrom(helper.make_node("Identity", second.input[:1], second.output))
      for values in attributes.values():
        values[:] = [v for i, v in enumerate(values) if i % 4 in (1, 2)]
  del graph.value_info[:]


def _save(path: str, file: str, content: bytes, notes: dict[str, Any], outputs: Any) -> None:
  shapes = {key: [*map(str, x.shape), x.dtype.name] for key, x in by_name(outputs).items()}
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / file).write_bytes(content)
  (folder / NOTES_FILE).write_text(json.dumps({**notes, "outputs": shapes}, indent=1) + "\n")


def by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by their path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in leaves}


def program_size(pretrained: Pretrained) -> tuple[int, int]:
  """Returns height and width of the program's images, the largest that preprocessing returns."""
  preprocess = pretrained.preprocess
  if preprocess.pad_size:
    return preprocess.pad_size
  if preprocess.fit == "shorter_side" and preprocess.max_side:
    side = -(-(preprocess.max_side + 8) // 32) * 32  # rounding adds up to half the aspect ratio
    return side, side
  height, width = pretrained.config.get("image_size") or preprocess.image_size
  return height, width


def preprocessing_steps(pretrained: Pretrained, *, of_program: bool = True) -> list[str]:
  """Returns the preprocessing in words."""
  preprocess = pretrained.preprocess
  is_detector = bool(pretrained.task) and tasks()[pretrained.task].predicts_boxes
  (height, width), (rows, columns) = preprocess.image_size, preprocess.uncropped_size
  limit = f", the longer at most {preprocess.max_side} (unrounded)" if preprocess.max_side else ""
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
    steps.append(f"pad at the right and bottom to {padded}, with any value; crop what exceeds it")
    steps += padding_notes(pretrained)
  numbers = f"minus mean {preprocess.means}, divided by std {preprocess.stds}"
  return [*steps, f"image / 255, {numbers}" + " (the program does this itself)" * of_program]


def padding_notes(pretrained: Pretrained) -> list[str]:
  """Returns how a program's results depend on its padding, which differs from `predict`'s."""
  outputs = task_of(pretrained).padding_dependent
  if pretrained.preprocess.pad_size or not outputs:
    return []
  return [f"the amount of padding changes {outputs}: the command predict pads less and differs"]


def _preprocessed(function: Any, pretrained: Pretrained, *, is_detector: bool) -> Any:
  def program(images: Any) -> Any:
    size = program_size(pretrained)
    resized, sides, given = traced_resize(images, pretrained.preprocess, size)
    if not is_detector:
      return function(resized)
    outputs = function(resized, jnp.broadcast_to(sides.astype(jnp.int32), (images.shape[0], 2)))
    scale = jnp.tile((given / sides)[::-1], 2)[None, None]
    return {**outputs, "boxes_xyxy": outputs["boxes_xyxy"] * scale}

  return program


def _program(pretrained: Pretrained) -> Any:
  model, numbers = pretrained.model, (pretrained.preprocess.mean, pretrained.preprocess.std)
  variables = jax.tree.map(jnp.asarray, pretrained.variables)
  return lambda images: model.apply(variables, normalize_images(images, *numbers))


def _detector(pretrained: Pretrained, *, one_by_one: bool) -> Any:
  task = task_of(pretrained)
  if not pretrained.preprocess.pad_size:  # otherwise the model was trained with this padding
    task = task.padding_invariant()
  variables = jax.tree.map(jnp.asarray, pretrained.variables)

  def detect(example: dict[str, Any]) -> Any:
    batch = jax.tree.map(lambda x: x[None], example)
    return jax.tree.map(lambda x: x[0], task.predict(variables, batch))

  def program(images: Any, image_size: Any) -> Any:
    batch = {"image": images, "image_size": image_size}
    return jax.lax.map(detect, batch) if one_by_one else task.predict(variables, batch)

  return program


def plain(value: Any) -> Any:
  """Returns a value as JSON represents it; dtypes by their name."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, str | int | float | None):
    return value
  return [plain(v) for v in value] if isinstance(value, list | tuple) else np.dtype(value).name


def _cubic(x: Array) -> Array:
  x = jnp.abs(x)
  near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _sinc(x: Array, reach: int) -> Array:
  return jnp.where(jnp.abs(x) < reach, jnp.sinc(x), 0)


_KERNELS: dict[str, Callable[[Array], Array]] = {  # Pillow's
  "bilinear": lambda x: jnp.maximum(1 - jnp.abs(x), 0),
  "bicubic": _cubic,
  "lanczos": lambda x: _sinc(x, 3) * jnp.sinc(x / 3),
  "hamming": lambda x: _sinc(x, 1) * (0.54 + 0.46 * jnp.cos(jnp.pi * x)),
  "box": lambda x: jnp.where((x > -0.5) & (x <= 0.5), 1.0, 0.0),
}


def traced_resize(
  images: UInt8[Array, "b h w 3"], preprocess: Preprocess, size: tuple[int, int]
) -> tuple[Float[Array, "b H W c"], Float[Array, "2"], Float[Array, "2"]]:
  """Returns RGB images after `preprocess.resize`, or padded to `size` at the right and bottom.

  Also returns height and width of the resized image, without the padding, and of the given one.
  Both may be symbolic: each axis is resized by a matrix that is computed from them. Grey levels are
  within 1 of numpy's, and within 2 for "opencv", whose area filter differs where an axis grows.
  """
  x = images.astype(jnp.float32)
  if preprocess.channels == 1:
    x = jnp.floor(x @ jnp.array([[19595.0], [38470.0], [7471.0]]) / 65536 + 0.5)
  # Not jnp.arange: ONNX converters have no dimension as a value.
  axes = [jnp.cumsum(jnp.ones((1, side), x.dtype), axis=1) - 0.5 for side in x.shape[1:3]]
  counts = [pixels[0, -1] + 0.5 for pixels in axes]
  resized = traced_size(preprocess, *counts)
  scales = [old / new for old, new in zip(counts, resized, strict=True)]
  is_area = jnp.maximum(*scales) > AREA_FROM
  corner = jnp.floor if preprocess.rounding in ("ratio", "nearest") else jnp.rint
  method, rounds = preprocess.interpolation, not preprocess.interpolation.startswith("tf_")
  if method == "opencv":
    x = _blur(_blur(x, scales[0], is_area, 1), scales[1], is_area, 2)
  for axis in (1, 0):  # Pillow's order: columns first
    new = jnp.arange(size[axis]) + 0.5
    if preprocess.has_fixed_size:
      new += corner((resized[axis] - size[axis]) / 2)
    weights = _weights(axes[axis], counts[axis], new, resized[axis], method, is_area)
    weights = jnp.where(new[:, None] < resized[axis], weights, 0)
    x = jnp.einsum(
      "bhwc,yh->bywc" if axis == 0 else "bhwc,xw->bhxc", x, weights, precision="highest"
    )
    if rounds and (method != "opencv" or axis == 0):
      x = jnp.clip(jnp.floor(x + 0.5), 0, 255)
  x = jnp.floor(jnp.clip(x, 0, 255)) if preprocess.truncate else x
  return x, jnp.stack(resized), jnp.stack(counts)


def traced_size(preprocess: Preprocess, height: Array, width: Array) -> list[Array]:
  """Returns height and width before a crop or padding, as `Preprocess.resized_size`."""
  sides, targets, rounding = [height, width], preprocess.uncropped_size, preprocess.rounding
  if preprocess.fit == "squash":
    return [jnp.float32(side) for side in targets]
  if preprocess.fit == "inside":
    scale, rounding = jnp.minimum(targets[0] / height, targets[1] / width), "floor"
  elif preprocess.fit == "crop" and targets[0] != targets[1]:
    scale, rounding = jnp.maximum(targets[0] / height, targets[1] / width), "nearest"
  else:
    short, long = jnp.minimum(height, width), jnp.maximum(height, width)
    limit = preprocess.max_side if preprocess.fit == "shorter_side" else None
    scale = jnp.minimum(targets[0] / short, (limit or jnp.inf) / long)
    if rounding in ("side", "ratio"):
      side = jnp.rint(short * scale)
      other = jnp.floor(side * long / short if rounding == "side" else long * scale + 1e-4)
      return [jnp.where(x == short, side, other) for x in sides]
  rounded = jnp.rint if rounding == "nearest" else lambda x: jnp.floor(x + 1e-4)
  return [jnp.maximum(rounded(side * scale), 1) for side in sides]


def _weights(
  pixels: Array, count: Array, centres: Array, resized: Array, method: str, is_area: Array
) -> Float[Array, "new old"]:
  """Returns the weight of each pixel in each resized one; `centres` in resized pixels."""
  centres, scale = (centres * count / resized)[:, None], count / resized
  if method == "nearest":
    return (pixels == jnp.floor(centres) + 0.5).astype(jnp.float32)
  first, last = centres - scale / 2, centres + scale / 2
  area = jnp.minimum(pixels + 0.5, last) - jnp.maximum(pixels - 0.5, first)
  area = jnp.maximum(area, 0) / scale
  if method == "tf_area":
    return area
  width = jnp.maximum(scale, 1)
  if method in ("tf_bilinear", "opencv"):  # not antialiased; edges are repeated
    centres, width = jnp.clip(centres, 0.5, count - 0.5), 1
  kernel = _KERNELS.get(method, _KERNELS["bilinear"])
  weights = kernel((pixels - centres) / width)
  weights = weights / jnp.sum(weights, axis=1, keepdims=True)
  return jnp.where(is_area, area, weights) if method == "opencv" else weights


def _blur(x: Array, scale: Array, is_area: Array, axis: int) -> Array:
  """Blurs an axis that shrinks by `scale`, as `data.images.resize`."""
  weight = jnp.where(is_area | (scale <= BLUR_FROM), 0.0, (scale**2 - 1) / 12)
  inner = [jax.lax.slice_in_dim(x, *ends, axis=axis) for ends in ((0, -1), (1, None))]
  edges = [jax.lax.slice_in_dim(x, *ends, axis=axis) for ends in ((1, 2), (-2, -1))]  # reflected
  both = sum(jnp.concatenate(parts, axis) for parts in ((edges[0], inner[0]), (inner[1], edges[1])))
  return jnp.rint((1 - 2 * weight) * x + weight * both)
