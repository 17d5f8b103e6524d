"""Exports a model as a program, for any batch size, that runs without this package."""

import dataclasses
import json
import logging as python_logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.extend.core import jaxpr_as_fun

from vit_jax_zoo.inference import traced_preprocess
from vit_jax_zoo.inference.load import task_of
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.tasks import tasks
from vit_jax_zoo.weights import Pretrained, relayout

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
    python_logging.getLogger("jax2onnx").setLevel("ERROR")  # it warns of its optional imports
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


def preprocessing_steps(pretrained: Pretrained) -> list[str]:
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
  return [*steps, f"in the program: image / 255, {numbers}"]


def padding_notes(pretrained: Pretrained) -> list[str]:
  """Returns how a program's results depend on its padding, which differs from `predict`'s."""
  outputs = task_of(pretrained).padding_dependent
  if pretrained.preprocess.pad_size or not outputs:
    return []
  return [f"the amount of padding changes {outputs}: the command predict pads less and differs"]


def _preprocessed(function: Any, pretrained: Pretrained, *, is_detector: bool) -> Any:
  def program(images: Any) -> Any:
    size = program_size(pretrained)
    resized, sides, given = traced_preprocess.resize(images, pretrained.preprocess, size)
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
