"""Model cards: README.md of an exported model, with the metadata of the Hugging Face hub."""

import dataclasses
import importlib
import json
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from vit_jax_zoo.errors import field_names
from vit_jax_zoo.inference.programs import NOTES_FILE, plain, preprocessing_steps
from vit_jax_zoo.registry import family_of
from vit_jax_zoo.run_metadata import CONFIG_FILE, DATA_FILE, load_run
from vit_jax_zoo.tasks import tasks
from vit_jax_zoo.training.checkpoint import find_checkpoint, is_checkpoint
from vit_jax_zoo.training.metric_writer import METRICS_FILE, read_metrics
from vit_jax_zoo.weights import Pretrained
from vit_jax_zoo.weights.hub import entries

MADE_BY = "exported by vit_jax_zoo"
_MAX_CLASSES = 1000  # that are listed; config.json has all

_USAGE = tomllib.loads(pathlib.Path(__file__).with_name("usage.toml").read_text())


def write(
  output: epath.Path, form: str, source: str, pretrained: Pretrained, license_id: str, hub_name: str
) -> epath.Path:
  """Writes the card of an export: `README.md` of a folder, "<name>.md" beside a file.

  `source` is the run, file or name that was exported; `license_id` one of the hub's identifiers;
  `hub_name` "user/name" on the hub, or "". Without `huggingface_hub` the card has no metadata. A
  README.md that is no such card is kept.
  """
  card = output / "README.md" if output.is_dir() else output.with_suffix(".md")
  if card.exists() and MADE_BY not in card.read_text():
    logging.warning("%s: not a model card of this package; kept", card)
    return card
  dataset, scores = _training(source)
  title, model = hub_name or output.name, pretrained.model
  defaults = {f.name: f.default for f in dataclasses.fields(model)}
  fields = {name: getattr(model, name) for name in field_names(model)}
  others = {name: value for name, value in fields.items() if value != defaults[name]}
  task = tasks()[pretrained.task] if pretrained.task else None
  names = pretrained.class_names
  listed = [*names[:_MAX_CLASSES], *([f"... ({len(names)} in all)"] * (len(names) > _MAX_CLASSES))]
  classes = "".join(["\n\nClasses:\n", *(f"\n- {name}" for name in listed)]) if names else ""
  count = sum(leaf.size for leaf in jax.tree.leaves(pretrained.variables["params"]))
  steps = enumerate(preprocessing_steps(pretrained), 1)
  sections = {
    "Use": f"```python\n{_usage(output, form, hub_name)}```",
    "Architecture": f"{type(model).__name__}, {count:,} parameters.\n\n{_table(others)}",
    "Data": f"Training data: {dataset or 'unknown'}." + classes,
    "Metrics": _table(scores) if scores else "Not measured.",
    "Preprocessing": "\n".join(f"{i}. {step}" for i, step in steps),
  }
  text = f"# {title}\n\nLicence: {license_id}; {MADE_BY} as `{form}`.\n"
  text += "".join(f"\n## {name}\n\n{content}\n" for name, content in sections.items())
  metadata = {
    "license": license_id,
    "library_name": _USAGE.get(form, _USAGE["other"])["library"],
    "pipeline_tag": task and task.hub_task,
    "tags": ["vit_jax_zoo", family_of(model)],
  }
  card.write_text(_front_matter(title, dataset, scores, **metadata) + text)
  return card


def _training(source: str) -> tuple[str, dict[str, Any]]:
  """Returns the training data in words, and the scores of the checkpoint, as far as known."""
  if not is_checkpoint(source):
    entry = entries().get(source)
    return "", {f"reported score ({entry.source})": entry.score} if entry else {}
  checkpoint = find_checkpoint(source)
  workdir = next(p for p in (checkpoint, *checkpoint.parents) if (p / CONFIG_FILE).exists())
  evaluations = tuple(f"{name}/" for name in load_run(workdir)[0]["data"]["eval"])
  data, rows = json.loads((workdir / DATA_FILE).read_text()), []
  if (workdir / METRICS_FILE).exists():
    rows = [row for row in read_metrics(workdir) if str(row["step"]) == checkpoint.name]
  scores = {k: v for row in rows for k, v in row.items() if k.startswith(evaluations)}
  return f"{data['name']}, {data['num_examples']} examples" if "name" in data else "", scores


def _front_matter(title: str, dataset: str, scores: Mapping[str, Any], **metadata: Any) -> str:
  try:
    hub = importlib.import_module("huggingface_hub")
  except ImportError:
    logging.info("model card: no metadata of the hub; pip install -e '.[hub]'")
    return ""
  task, name = metadata["pipeline_tag"], dataset.partition(",")[0]
  results = [hub.EvalResult(task, name, name, *x) for x in scores.items() if name and task]
  more = {"model_name": title, "eval_results": results} if results else {}
  return f"---\n{hub.ModelCardData(**metadata, **more).to_yaml()}\n---\n\n"


def _table(values: Mapping[str, Any]) -> str:
  rows = {k: f"{v:.4g}" if isinstance(v, float) else plain(v) for k, v in values.items()}
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
  elif (notes_file := output / NOTES_FILE).exists():
    notes = json.loads(notes_file.read_text())
    inputs = [name for name in ("images", "image_size") if name in notes]
    fields["inputs"] = ", ".join(inputs)
    fields["feed"] = ", ".join(f'"{name}": {name}' for name in inputs)
  code = _USAGE.get(form, _USAGE["other"])["code"].format(**fields)
  return "import huggingface_hub\n" * ("huggingface_hub." in path) + code
