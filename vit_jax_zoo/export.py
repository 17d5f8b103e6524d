"""Exports a model to the formats of other libraries.

    python -m vit_jax_zoo.export --model=runs/vit_b16 --format=safetensors-timm --output=out/
    python -m vit_jax_zoo.export --model=ViT-B_16.npz --format=hf --output=out/

Formats, their outputs, and who reads them:

    safetensors-timm  folder: model.safetensors, config.json; timm, `local-dir:<path>`
    hf                folder: model.safetensors and JSON files; transformers
    npz               file in Google's layout; vision_transformer, big_vision
    pth, pt           file of the official code: DETR, FPT; TTSR
    orbax             folder: a checkpoint of this package; `--model`, Orbax
    stablehlo, onnx   folder: the whole program, not of TTSR (several inputs); JAX, ONNX Runtime

If a format does not support a model, the error names the field. Exports have a model card.
"""

import dataclasses
import importlib
import json
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from etils import epath

from vit_jax_zoo import cli
from vit_jax_zoo.errors import check_names
from vit_jax_zoo.inference import programs
from vit_jax_zoo.inference.load import load_pretrained
from vit_jax_zoo.registry import family_of, systems, variants
from vit_jax_zoo.run_metadata import CONFIG_FILE, DATA_FILE, load_run
from vit_jax_zoo.tasks import task_fields, tasks
from vit_jax_zoo.training.checkpoint import BEST, find_checkpoint, is_checkpoint
from vit_jax_zoo.training.metric_writer import METRICS_FILE, read_metrics
from vit_jax_zoo.weights import Pretrained, hub
from vit_jax_zoo.weights.key_map import unroll
from vit_jax_zoo.weights.load import flatten_variables, writable_formats

FLAGS = flags.FLAGS

MADE_BY = "exported by vit_jax_zoo"
_MAX_CLASSES = 1000  # that are listed; config.json has all

_USAGE = tomllib.loads(pathlib.Path(__file__).with_name("usage.toml").read_text())


def define_flags() -> None:
  """Defines the command's flags: not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run's workdir, or a published file, folder or name")
  flags.DEFINE_string("format", None, "output format; see above")
  flags.DEFINE_string("output", None, "output folder or file")
  flags.DEFINE_integer("image_size", None, "image size; position embeddings are interpolated")
  flags.DEFINE_bool("with_preprocessing", False, "programs take uint8 images, from 2 x 2 pixels")
  flags.DEFINE_string("license", "unknown", "licence in the model card: apache-2.0, mit, ...")
  flags.DEFINE_string("push_to_hub", None, "user/name: also uploads all to the Hugging Face hub")


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
    raise ValueError(f"--output: {output} has files, which --push_to_hub uploads; use a new folder")
  _check_output(epath.Path(FLAGS.model), output)
  pretrained = load_pretrained(FLAGS.model, **size)
  write(pretrained, FLAGS.format, FLAGS.output, **options)
  card = write_card(output, FLAGS.format, FLAGS.model, pretrained, FLAGS.license, repository)
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
  is_export = card.exists() and MADE_BY.encode() in card.read_bytes()
  if output.exists() and not is_export and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"--output={output}: holds what is no export, as it has no {card}; {advice}")


PROGRAMS = {"stablehlo": programs.write_stablehlo, "onnx": programs.write_onnx}


def formats_of(family: str) -> tuple[str, ...]:
  """Returns the names of the formats in which a family of models can be written."""
  excluded = {"orbax": "parts", **dict.fromkeys(PROGRAMS, "several_inputs")}
  every = systems().values()
  left = {form for form, field in excluded.items() for s in every if family in getattr(s, field)}
  return (*writable_formats(family), *(form for form in excluded if form not in left))


def write(pretrained: Pretrained, form: str, path: str, **options: Any) -> None:
  """Writes a model; `form` is one of `formats_of`, `options` are those of `make_program`."""
  family = family_of(pretrained.model)
  check_names(f"--format of {family}", [form], formats_of(family))
  if form in PROGRAMS:
    PROGRAMS[form](pretrained, path, **options)
  elif form == "orbax":
    write_orbax(pretrained, family, path)
  else:
    # Writers of published formats take variables by path, layers unrolled.
    flat = {key: np.asarray(x) for key, x in flatten_variables(pretrained.variables).items()}
    flat_pretrained = dataclasses.replace(pretrained, variables=unroll(flat))
    writable_formats(family)[form].write_checkpoint(path, flat_pretrained)


def write_orbax(pretrained: Pretrained, family: str, path: str) -> None:
  """Writes a checkpoint for `--model` and `init_from`, with its config beside it."""
  folder = epath.Path(path).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:  # which waits until it is written
    checkpointer.save(folder / "variables", pretrained.variables, force=True)
  size, preprocess = pretrained.config.get("image_size"), pretrained.preprocess
  fields, names = pretrained.fields(), task_fields(pretrained.task)
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
    (folder / file).write_text(json.dumps(programs.plain(content), indent=1) + "\n")


def write_card(
  output: epath.Path, form: str, source: str, pretrained: Pretrained, license_id: str, hub_name: str
) -> epath.Path:
  """Writes the card of an export: `README.md` of a folder, "<name>.md" beside a file.

  `source` was exported; `license_id` is one of the hub's; `hub_name` "user/name" on it, or "".
  Without `huggingface_hub` the card has no metadata. A README.md that is no such card is kept.
  """
  card = output / "README.md" if output.is_dir() else output.with_suffix(".md")
  if card.exists() and MADE_BY not in card.read_text():
    logging.warning("%s: not a model card of this package; kept", card)
    return card
  dataset, scores, tests, measured = _training(source)
  title, model, names = hub_name or output.name, pretrained.model, pretrained.class_names
  defaults = {f.name: f.default for f in dataclasses.fields(model)}
  others = {k: value for k, value in pretrained.fields().items() if value != defaults[k]}
  task = tasks()[pretrained.task] if pretrained.task else None
  listed = [*names[:_MAX_CLASSES], *([f"... ({len(names)} in all)"] * (len(names) > _MAX_CLASSES))]
  classes = "".join(["\n\nClasses:\n", *(f"\n- {name}" for name in listed)]) if names else ""
  count = sum(leaf.size for leaf in jax.tree.leaves(pretrained.variables["params"]))
  steps = enumerate(programs.preprocessing_steps(pretrained, of_program=form in PROGRAMS), 1)
  notes = json.loads((output / programs.NOTES_FILE).read_text()) if form in PROGRAMS else {}
  whole = "The program does all steps; its input is uint8 RGB of any size from 2 x 2.\n\n"
  sections = {
    "Use": f"```python\n{_usage(output, form, hub_name)}```",
    "Architecture": f"{type(model).__name__}, {count:,} parameters.\n\n{_table(others)}",
    "Data": f"Training data: {dataset or 'unknown'}." + classes,
    "Metrics": f"{measured}{_table(scores)}" if scores else "Not measured.",
    "Preprocessing": (whole if "in_program" in notes else "")
    + "\n".join(f"{i}. {step}" for i, step in steps)
    + _USAGE.get(form, _USAGE["other"]).get("preprocessing", ""),
  }
  text = f"# {title}\n\nLicence: {license_id}; {MADE_BY} as `{form}`.\n"
  text += "".join(f"\n## {name}\n\n{content}\n" for name, content in sections.items())
  metadata = {
    "license": license_id,
    "library_name": _USAGE.get(form, _USAGE["other"])["library"],
    "pipeline_tag": task and task.hub_task,
    "tags": ["vit_jax_zoo", family_of(model)],
  }
  card.write_text(_front_matter(title, scores, tests, **metadata) + text)
  return card


def _training(source: str) -> tuple[str, dict[str, Any], dict[str, str], str]:
  """Returns training data, scores of the exported weights, data by evaluation, step; or empty."""
  if not is_checkpoint(source):
    entry = hub.entries().get(source)
    return "", {f"reported score ({entry.source})": entry.score} if entry else {}, {}, ""
  checkpoint = find_checkpoint(source)
  workdir = next(p for p in (checkpoint, *checkpoint.parents) if (p / CONFIG_FILE).exists())
  evaluations = load_run(workdir)[0]["data"]["eval"]
  data, rows = json.loads((workdir / DATA_FILE).read_text()), []
  if (workdir / METRICS_FILE).exists():
    rows = [row for row in read_metrics(workdir) if str(row["step"]) == checkpoint.name]
  scores = {k: v for row in rows for k, v in row.items() if k.partition("/")[0] in evaluations}
  tests = {k: f"{e.get('source')} {e.get('split', '')}".strip() for k, e in evaluations.items()}
  best = ", the run's best checkpoint" if checkpoint.parent.name == BEST else ""
  listed = ", ".join(f"{name} ({data})" for name, data in tests.items())
  measured = f"Of the exported weights, those of step {checkpoint.name}{best}, on {listed}.\n\n"
  dataset = f"{data['name']}, {data['num_examples']} examples" if "name" in data else ""
  return dataset, scores, tests, measured


def _front_matter(title: str, scores: Any, tests: Mapping[str, str], **metadata: Any) -> str:
  try:
    hf = importlib.import_module("huggingface_hub")
  except ImportError:
    logging.info("model card: no metadata of the hub; pip install -e '.[hub]'")
    return ""
  task = metadata["pipeline_tag"]
  found = [(*k.split("/", 1), value) for k, value in scores.items()] if task and tests else []
  results = [hf.EvalResult(task, tests[e], tests[e], k, v) for e, k, v in found if k != "images"]
  more = {"model_name": title, "eval_results": results} if results else {}
  return f"---\n{hf.ModelCardData(**metadata, **more).to_yaml()}\n---\n\n"


def _table(values: Mapping[str, Any]) -> str:
  rows = {k: f"{v:.4g}" if isinstance(v, float) else programs.plain(v) for k, v in values.items()}
  return "\n".join(["| name | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _usage(output: epath.Path, form: str, hub_name: str) -> str:
  """Returns code that loads the export, in the format's library and here."""
  name, path = hub_name or str(output), json.dumps(str(output))
  if hub_name:
    file = "" if output.is_dir() else f', "{output.name}"'
    path = f'huggingface_hub.{"hf_hub" if file else "snapshot"}_download("{hub_name}"{file})'
  fields = {"path": path, "name": name, "timm": f"{'hf-hub' if hub_name else 'local-dir'}:{name}"}
  if form == "hf":
    fields["architecture"] = json.loads((output / "config.json").read_text())["architectures"][0]
  elif (notes_file := output / programs.NOTES_FILE).exists():
    notes = json.loads(notes_file.read_text())
    inputs = [name for name in ("images", "image_size") if name in notes]
    fields["inputs"] = ", ".join(inputs)
    fields["feed"] = ", ".join(f'"{name}": {name}' for name in inputs)
  code = _USAGE.get(form, _USAGE["other"])["code"].format(**fields)
  return "import huggingface_hub\n" * ("huggingface_hub." in path) + code


if __name__ == "__main__":
  cli.run(main, define_flags, renamed={"workdir": "model"})
