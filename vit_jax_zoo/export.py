"""Exports a model to the formats of other libraries.

    python -m vit_jax_zoo.export --model=runs/vit_b16 --format=safetensors-timm --output=out/
    python -m vit_jax_zoo.export --model=ViT-B_16.npz --format=hf --output=out/

| format           | output                                     | read by                  |
|------------------|--------------------------------------------|--------------------------|
| safetensors-timm | folder: model.safetensors, config.json     | timm, `local-dir:<path>` |
| hf               | folder: model.safetensors and JSON files   | transformers             |
| npz              | file in Google's layout                    | vision_transformer       |
| orbax            | folder: a checkpoint of this package       | `--model`, Orbax         |
| stablehlo        | folder: model.stablehlo, the whole program | any program with JAX     |

Systems register further formats (`registry.Format`). If a format does not support a model, the
error names the field. Models with several inputs (TTSR) cannot be written as StableHLO.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from etils import epath

from vit_jax_zoo import cli
from vit_jax_zoo.errors import check_names
from vit_jax_zoo.inference.load import load_pretrained, task_of
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.registry import family_of, systems, variants
from vit_jax_zoo.run_metadata import CONFIG_FILE, DATA_FILE
from vit_jax_zoo.tasks import task_fields, tasks
from vit_jax_zoo.weights import Preprocess, Pretrained
from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.formats import writable_formats, write_checkpoint
from vit_jax_zoo.weights.key_map import unroll
from vit_jax_zoo.weights.load import flatten_variables

FLAGS = flags.FLAGS

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO_FILE, STABLEHLO_NOTES = "model.stablehlo", "model.json"
MAX_STABLEHLO = 2_000_000_000  # bytes; 2 GiB is the maximum size of a protocol buffer


def define_flags() -> None:
  """Defines the command's flags: not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run's workdir, or a published file, folder or name")
  flags.DEFINE_string("format", None, "output format; see the table above")
  flags.DEFINE_string("output", None, "output folder or file")
  flags.DEFINE_integer("image_size", None, "image size; position embeddings are interpolated")


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the process's exit status."""
  if argv[1:]:
    raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
  for name in ("model", "format", "output"):
    if FLAGS[name].value is None:
      raise ValueError(f"--{name}: missing; see python -m vit_jax_zoo.export --help")
  options = {} if FLAGS.image_size is None else {"image_size": FLAGS.image_size}
  write(load_pretrained(FLAGS.model, **options), FLAGS.format, FLAGS.output)
  logging.info("%s written as %s: %s", FLAGS.model, FLAGS.format, FLAGS.output)
  return 0


def formats_of(family: str) -> tuple[str, ...]:
  """Returns the names of the formats in which a family of models can be written."""
  excluded = {"orbax": "parts", "stablehlo": "several_inputs"}
  every = systems().values()
  left = {form for form, field in excluded.items() for s in every if family in getattr(s, field)}
  return (*writable_formats(family), *(form for form in excluded if form not in left))


def write(pretrained: Pretrained, form: str, path: str) -> None:
  """Writes a model in one of `formats_of` its family; ValueError if the format is another."""
  family = family_of(pretrained.model)
  check_names(f"format of {family}", [form], formats_of(family))
  if form == "orbax":
    write_orbax(pretrained, family, path)
  elif form == "stablehlo":
    write_stablehlo(pretrained, path)
  else:
    write_checkpoint(path, form, export_of(pretrained))


def export_of(pretrained: Pretrained) -> Export:
  """Returns the input of the writers of published formats."""
  model, preprocess = pretrained.model, pretrained.preprocess
  flat = {key: np.asarray(x) for key, x in flatten_variables(pretrained.variables).items()}
  task = {"task": pretrained.task, "task_fields": pretrained.task_fields}
  return Export(family_of(model), model, unroll(flat), preprocess, **task)


def write_orbax(pretrained: Pretrained, family: str, path: str) -> None:
  """Writes a checkpoint for `--model` and `init_from`, with its config beside it."""
  folder = epath.Path(path).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(folder / "variables", pretrained.variables, force=True)
  checkpointer.wait_until_finished()
  checkpointer.close()
  size, preprocess = pretrained.config.get("image_size"), pretrained.preprocess
  fields, names = export_of(pretrained).fields(), task_fields(pretrained.task)
  from_data = {"num_classes": None, "class_names": None}
  numbers = {"image_mean": preprocess.mean, "image_std": preprocess.std}
  task = {**pretrained.task_fields, **numbers, **from_data}
  config = {
    "model": {"name": next(iter(variants(family))), **fields},
    "task": {"name": pretrained.task, **{k: v for k, v in task.items() if k in names}},
    "data": {"eval": {"test": {"transforms": []}}},
    "preprocess": dataclasses.asdict(preprocess),
    "checkpoint": {},
  }
  data = {
    "num_classes": fields.get("num_classes"),
    "class_names": pretrained.class_names,
    "shapes": {"image": [*size, preprocess.channels]} if size and preprocess.has_fixed_size else {},
  }
  for file, content in ((CONFIG_FILE, config), (DATA_FILE, data)):
    (folder / file).write_text(json.dumps(_plain(content), indent=1) + "\n")


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, str | int | float | None):
    return value
  return [_plain(v) for v in value] if isinstance(value, list | tuple) else np.dtype(value).name


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
  height, width = _program_size(pretrained)
  (batch,), channels = jax.export.symbolic_shape("b"), preprocess.channels
  arguments = [jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32)]
  if is_detector:
    arguments.append(jax.ShapeDtypeStruct((batch, 2), jnp.int32))
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
    "images": ["b", str(height), str(width), str(channels), "float32 in [0, 255]"],
    "outputs": outputs,
    "platforms": list(PLATFORMS),
    "class_names": list(pretrained.class_names),
    "preprocess": _plain(dataclasses.asdict(preprocess)),
    "steps": _steps(preprocess, (height, width), is_detector=is_detector),
  }
  if is_detector:
    notes["image_size"] = ["b", "2", "int32, height and width without the padding"]
  (folder / STABLEHLO_NOTES).write_text(json.dumps(notes, indent=1) + "\n")


def _program_size(pretrained: Pretrained) -> tuple[int, int]:
  """Returns height and width of the program's images, the largest that preprocessing returns."""
  preprocess = pretrained.preprocess
  if preprocess.pad_size:
    return preprocess.pad_size
  if preprocess.fit == "shorter_side" and preprocess.max_side:
    side = -(-preprocess.max_side // 32) * 32  # rounding may exceed `max_side`
    return side, side
  height, width = pretrained.config.get("image_size") or preprocess.image_size
  return height, width


def _steps(preprocess: Preprocess, size: tuple[int, int], *, is_detector: bool) -> list[str]:
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
    steps.append(f"pad at the right and bottom to {size[0]} x {size[1]}, with any value")
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


if __name__ == "__main__":
  cli.run(main, define_flags, renamed={"workdir": "model"})
