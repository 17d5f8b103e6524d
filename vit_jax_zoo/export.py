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
| onnx             | folder: model.onnx, the whole program      | ONNX Runtime and others  |

Systems register further formats (`registry.Format`). If a format does not support a model, the
error names the field. Models with several inputs (TTSR) cannot be written as programs. Each
export has a model card, README.md; `--push_to_hub=user/name` uploads it all.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from etils import epath

from vit_jax_zoo import cli
from vit_jax_zoo.errors import check_names
from vit_jax_zoo.inference import model_card
from vit_jax_zoo.inference.load import load_pretrained
from vit_jax_zoo.inference.programs import plain, write_onnx, write_stablehlo
from vit_jax_zoo.registry import family_of, systems, variants
from vit_jax_zoo.run_metadata import CONFIG_FILE, DATA_FILE
from vit_jax_zoo.tasks import task_fields
from vit_jax_zoo.weights import Pretrained, hub
from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.key_map import unroll
from vit_jax_zoo.weights.load import flatten_variables, writable_formats

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the command's flags: not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run's workdir, or a published file, folder or name")
  flags.DEFINE_string("format", None, "output format; see the table above")
  flags.DEFINE_string("output", None, "output folder or file")
  flags.DEFINE_integer("image_size", None, "image size; position embeddings are interpolated")
  flags.DEFINE_bool("with_preprocessing", False, "programs take uint8 images of any size")
  flags.DEFINE_string("license", "unknown", "licence in the model card: apache-2.0, mit, ...")
  flags.DEFINE_string("push_to_hub", None, "user/name: also uploads to the Hugging Face hub")


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the process's exit status."""
  if argv[1:]:
    raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
  for name in ("model", "format", "output"):
    if FLAGS[name].value is None:
      raise ValueError(f"--{name}: missing; see python -m vit_jax_zoo.export --help")
  size = {} if FLAGS.image_size is None else {"image_size": FLAGS.image_size}
  options = {"with_preprocessing": True} if FLAGS.with_preprocessing else {}
  if options and FLAGS.format not in PROGRAMS:
    wrong = f"--with_preprocessing: not supported by --format={FLAGS.format}"
    raise ValueError(f"{wrong}; expected {' or '.join(PROGRAMS)}")
  repository, output = FLAGS.push_to_hub or "", epath.Path(FLAGS.output)
  if repository and repository.count("/") != 1:
    raise ValueError(f"--push_to_hub: {repository!r}; expected user/name")
  if repository and output.is_dir() and any(output.iterdir()):
    wrong = f"--output: {output} has files; expected a new folder"
    raise ValueError(f"{wrong}, all of which --push_to_hub uploads")
  _check_output(epath.Path(FLAGS.model), output)
  pretrained = load_pretrained(FLAGS.model, **size)
  write(pretrained, FLAGS.format, FLAGS.output, **options)
  card = model_card.write(output, FLAGS.format, FLAGS.model, pretrained, FLAGS.license, repository)
  logging.info("%s written as %s: %s, %s", FLAGS.model, FLAGS.format, output, card)
  if repository:
    logging.info("uploaded: %s", hub.push(repository, output, card))
  return 0


def _check_output(model: epath.Path, output: epath.Path) -> None:
  """Raises ValueError if the output holds the model, or files of which there is no model card."""
  source, advice = model.expanduser().resolve(), "use another folder or file"
  if model.exists() and output.resolve() in (source, *source.parents):
    raise ValueError(f"--output={output}: holds --model={model}; {advice}")
  card = output / "README.md" if output.is_dir() else output.with_suffix(".md")
  is_export = card.exists() and model_card.MADE_BY.encode() in card.read_bytes()
  if output.exists() and not is_export and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"--output={output}: holds what is no export, as it has no {card}; {advice}")


PROGRAMS = {"stablehlo": write_stablehlo, "onnx": write_onnx}


def formats_of(family: str) -> tuple[str, ...]:
  """Returns the names of the formats in which a family of models can be written."""
  excluded = {"orbax": "parts", **dict.fromkeys(PROGRAMS, "several_inputs")}
  every = systems().values()
  left = {form for form, field in excluded.items() for s in every if family in getattr(s, field)}
  return (*writable_formats(family), *(form for form in excluded if form not in left))


def write(pretrained: Pretrained, form: str, path: str, **options: Any) -> None:
  """Writes a model in one of `formats_of` its family; ValueError if the format is another.

  `options` are those of `programs.make_program`, for programs.
  """
  family = family_of(pretrained.model)
  check_names(f"format of {family}", [form], formats_of(family))
  if form in PROGRAMS:
    PROGRAMS[form](pretrained, path, **options)
  elif form == "orbax":
    write_orbax(pretrained, family, path)
  else:
    writable_formats(family)[form].write_checkpoint(path, export_of(pretrained))


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
    (folder / file).write_text(json.dumps(plain(content), indent=1) + "\n")


if __name__ == "__main__":
  cli.run(main, define_flags, renamed={"workdir": "model"})
