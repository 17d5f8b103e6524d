"""Writes a model in a form that others read.

    python -m vit_jax_zoo.export --model=runs/vit_b16 --format=safetensors-timm --output=out/
    python -m vit_jax_zoo.export --model=ViT-B_16.npz --format=hf --output=out/

| format           | what is written                                 | read by                   |
|------------------|-------------------------------------------------|---------------------------|
| safetensors-timm | a folder: model.safetensors, config.json        | timm, `local-dir:<path>`  |
| hf               | a folder: model.safetensors and its JSON files  | transformers              |
| npz              | one file, in Google's layout                    | vision_transformer        |
| orbax            | a folder that is a checkpoint of this package   | `--model`, Orbax        |
| stablehlo        | a folder: model.stablehlo, the whole program    | any program with JAX      |

What else a family is published as stands in `weights/formats.py`. A format that has no such model
says what stands in the way. TTSR is not written as a program, since that takes one picture, and
TTSR takes four.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from etils import epath

from vit_jax_zoo import cli as command_line
from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.inference.load import load_pretrained
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.registry import family_of, systems, variants
from vit_jax_zoo.run_metadata import CONFIG_FILE, DATA_FILE
from vit_jax_zoo.weights import Pretrained
from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.formats import writable_formats, write_checkpoint
from vit_jax_zoo.weights.key_map import unroll
from vit_jax_zoo.weights.load import flatten_variables

FLAGS = flags.FLAGS


PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO_FILE, STABLEHLO_NOTES = "model.stablehlo", "model.json"

MAX_STABLEHLO = 2_000_000_000
"""Bytes: a program of StableHLO is one protocol buffer, which can be no larger than 2 GiB."""


def define_flags() -> None:
  """Defines the command's flags: not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run, or a published file, folder or name")
  flags.DEFINE_string("format", None, "output format; see the table above")
  flags.DEFINE_string("output", None, "output folder or file")
  flags.DEFINE_integer("image_size", None, "image size; position embeddings are interpolated")
  flags.DEFINE_bool("traceback", False, "show the traceback of an error")


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the process's exit status."""
  if argv[1:]:
    raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
  for name in ("model", "format", "output"):
    if FLAGS[name].value is None:
      raise ValueError(f"--{name} is missing; see python -m vit_jax_zoo.export --help")
  options = {} if FLAGS.image_size is None else {"image_size": FLAGS.image_size}
  pretrained = load_pretrained(FLAGS.model, **options)
  write(pretrained, FLAGS.format, FLAGS.output)
  logging.info("%s written as %s: %s", FLAGS.model, FLAGS.format, FLAGS.output)
  return 0


def formats_of(family: str) -> tuple[str, ...]:
  """Returns the names of the formats in which a family of models can be written."""
  is_part, several_inputs = (
    any(family in getattr(system, field) for system in systems().values())
    for field in ("parts", "several_inputs")
  )
  return (
    *writable_formats(family),
    *(() if is_part else ("orbax",)),
    *(() if several_inputs else ("stablehlo",)),
  )


def write(pretrained: Pretrained, form: str, path: str) -> None:
  """Writes a model.

  Args:
    pretrained: the model, its variables, and how pictures come to it.
    form: one of `formats_of` its family.
    path: the folder or file to write.

  Raises:
    ValueError: the family is not written in this format, or the format has no such model.
  """
  family = family_of(pretrained.model)
  known = formats_of(family)
  if form not in known:
    raise ValueError(unknown_name(f"format of {family}", form, known))
  if form == "orbax":
    write_orbax(pretrained, family, path)
  elif form == "stablehlo":
    write_stablehlo(pretrained, path)
  else:
    write_checkpoint(path, form, export_of(pretrained))


def export_of(pretrained: Pretrained) -> Export:
  """Returns a model as the writers of published formats take it."""
  flat = {key: np.asarray(x) for key, x in flatten_variables(pretrained.variables).items()}
  return Export(
    family_of(pretrained.model),
    pretrained.model,
    unroll(flat),
    pretrained.preprocess,
    task=pretrained.task,
    task_fields=pretrained.task_fields,
  )


def write_orbax(pretrained: Pretrained, family: str, path: str) -> None:
  """Writes a checkpoint that `--model` and `init_from` take, with its config beside it."""
  folder = epath.Path(path).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(folder / "variables", pretrained.variables, force=True)
  checkpointer.wait_until_finished()
  checkpointer.close()
  size, preprocess = pretrained.config["image_size"], pretrained.preprocess
  fields = export_of(pretrained).fields()
  name = next(iter(variants(family)))
  known = {k: v for k, v in pretrained.task_fields.items() if k != "class_names"}
  task = {"name": pretrained.task, **known}
  if pretrained.task == "classification":
    task |= {"num_classes": None, "class_names": None}
    task |= {"image_mean": preprocess.mean, "image_std": preprocess.std}
  config = {
    "model": {"name": name, **{k: _plain(v) for k, v in fields.items()}},
    "task": task,
    "data": {"eval": {"test": {"transforms": _transforms(pretrained)}}},
    "checkpoint": {},
  }
  names = pretrained.class_names
  data = {
    "num_classes": fields.get("num_classes"),
    "class_names": list(names),
    "shapes": {"image": [*size, preprocess.channels]} if size else {},
  }
  for file, content in ((CONFIG_FILE, config), (DATA_FILE, data)):
    (folder / file).write_text(json.dumps(content, indent=1) + "\n")


def _transforms(pretrained: Pretrained) -> list[dict[str, Any]]:
  preprocess = pretrained.preprocess
  size = list(preprocess.image_size)
  if preprocess.fit == "crop":
    side = round(min(size) / preprocess.crop_pct)
    return [
      {"name": "resize_small", "size": side, "method": "antialias"},
      {"name": "central_crop", "size": size},
    ]
  method = "bilinear" if preprocess.interpolation == "tf_bilinear" else "antialias"
  return [{"name": "resize", "size": size, "method": method, "dtype": "float32"}]


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, str | int | float | None):
    return value
  return [_plain(v) for v in value] if isinstance(value, list | tuple) else np.dtype(value).name


def write_stablehlo(pretrained: Pretrained, path: str) -> None:
  """Writes a program that takes `images`, float32 [b h w c] in [0, 255], b any number.

  It normalises them and returns what the model does, by name. Weights are part of it. To run it:

      exported = jax.export.deserialize(open("model.stablehlo", "rb").read())
      outputs = exported.call(images)

  Raises:
    ValueError: the weights are too large for one file.
  """
  size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pretrained.variables))
  if size > MAX_STABLEHLO:
    raise ValueError(
      f"the weights have {size / 1e9:.1f} GB, and a StableHLO file holds 2; export them as orbax"
    )
  height, width = pretrained.config["image_size"]
  (batch,), channels = jax.export.symbolic_shape("b"), pretrained.preprocess.channels
  images = jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32)
  exported = jax.export.export(jax.jit(_program(pretrained)), platforms=PLATFORMS)(images)
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
  }
  (folder / STABLEHLO_NOTES).write_text(json.dumps(notes, indent=1) + "\n")


def _program(pretrained: Pretrained) -> Any:
  model, preprocess = pretrained.model, pretrained.preprocess
  variables = jax.tree.map(jnp.asarray, pretrained.variables)

  def program(images: Any) -> Any:
    return model.apply(variables, normalize_images(images, preprocess.mean, preprocess.std))

  return program


if __name__ == "__main__":
  command_line.run(main, define_flags, renamed={"workdir": "model"})
