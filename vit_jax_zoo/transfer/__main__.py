r"""Evaluates a model's features, or its classes, on other datasets.

    python -m vit_jax_zoo.transfer --model=runs/vit_demo --suite=few_shot,knn --data=demo:photos
    python -m vit_jax_zoo.transfer --model=ViT-B_16.npz --suite=vtab --data_dir=/data
    python -m vit_jax_zoo.transfer --model=openai/imagegpt-small --suite=linear --data=cifar10
    python -m vit_jax_zoo.transfer --model=runs/igpt_xl_imagenet --suite=linear_sgd \
      --data=imagenet2012 --concatenate=5

Images are preprocessed as in the model's own evaluation. Suites, which share features:

    few_shot    ridge regression on 1, 5, 10, 25 images per class, three draws
    linear      logistic regression by L-BFGS (iGPT's for CIFAR and STL-10)
    linear_sgd  logistic regression by SGD (iGPT's for ImageNet)
    knn         k nearest neighbours
    vtab        VTAB-1k's 19 tasks, 800 + 200 images each, linear on frozen features

imagenet, real, v2, a, r: an ImageNet classifier on the validation images, their ReaL labels,
ImageNet-V2, -A and -R.

Datasets that are not prepared are skipped, with the command that prepares them. The VTAB paper's
scores are of fine-tuned models, and higher than linear ones. Tested only on the embedded datasets.

`transfer.json` and a figure per suite are written to `--output`.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags, logging
from matplotlib.figure import Figure
from PIL import Image

from vit_jax_zoo import cli
from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.figures.curves import draw_accuracies, draw_shots
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.metrics.feature_probes import PROBES
from vit_jax_zoo.training.disk import write_json
from vit_jax_zoo.transfer.suites import SUITES, Extractor, Outcome, Request, run_suites, vtab_means

FLAGS = flags.FLAGS

RESULTS_FILE = "transfer.json"

TITLES = {
  **{name: probe.title for name, probe in PROBES.items()},
  "vtab": "VTAB-1k, linear on frozen features",
  "imagenet": "ImageNet, validation images",
  "real": "ImageNet-ReaL",
  "v2": "ImageNet-V2",
  "a": "ImageNet-A",
  "r": "ImageNet-R",
}


def define_flags() -> None:
  """Defines the command's flags: not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("model", None, "a run's workdir, or a published file, folder or name")
  flags.DEFINE_list("suite", [], f"suites: {', '.join(SUITES)}")
  flags.DEFINE_list("data", [], "sources (folder:/path), or datasets of the suite; default: all")
  flags.DEFINE_string("data_dir", None, "TFDS data folder")
  flags.DEFINE_string("fit_split", "train", "training split of the sources in --data")
  flags.DEFINE_string("test_split", "test", "test split of the sources in --data")
  flags.DEFINE_string("output", "transfer", "output folder")
  flags.DEFINE_integer("image_size", None, "image size; position embeddings are interpolated")
  flags.DEFINE_integer("batch_size", 128, "batch size")
  flags.DEFINE_integer("num_workers", 0, "worker processes for reading")
  flags.DEFINE_enum("on_corrupt", "error", ["error", "skip"], "what to do with unreadable images")
  flags.DEFINE_integer("sgd_epochs", None, "epochs of linear_sgd")
  flags.DEFINE_integer("concatenate", 0, "also probe this number of concatenated layers")


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the process's exit status."""
  if argv[1:]:
    raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
  if FLAGS.model is None:
    raise ValueError("--model: missing; expected a run's workdir, or a published file or name")
  probes = {name: {"concatenate": FLAGS.concatenate} for name in ("linear", "linear_sgd")}
  if FLAGS.sgd_epochs is not None:
    probes["linear_sgd"]["num_epochs"] = FLAGS.sgd_epochs
  splits = {"fit_split": FLAGS.fit_split, "test_split": FLAGS.test_split}
  request = Request(FLAGS.suite, FLAGS.data, FLAGS.data_dir, **splits, probes=probes)
  options = {} if FLAGS.image_size is None else {"image_size": FLAGS.image_size}
  trained = load(FLAGS.model, needs_head=False, **options)
  names = ("batch_size", "num_workers", "on_corrupt")
  reading: dict[str, Any] = {name: FLAGS[name].value for name in names}
  model = {"model": trained.model_name, "source": trained.source}
  return run_and_write(request, Extractor(trained, **reading), pathlib.Path(FLAGS.output), model)


def run_and_write(
  request: Request, extractor: Extractor, output: pathlib.Path, model: Mapping[str, Any]
) -> int:
  """Runs the suites, writes `model` and the results after each dataset, returns the exit status."""
  output.mkdir(parents=True, exist_ok=True)
  file = output / RESULTS_FILE
  is_own = file.is_file() and b'"suites"' in file.read_bytes()
  if not is_own and (file.exists() or any(output.glob("*.png"))):
    raise ValueError(f"--output={output}: holds pictures or {file.name} of others; use another")
  outcomes: list[Outcome] = []
  for outcome in run_suites(request, extractor):
    outcomes.append(outcome)
    if outcome.missing:
      logging.warning("%s skipped: %s", outcome.title, outcome.missing)
    else:
      scores = "  ".join(f"{name} {value:.4g}" for name, value in outcome.scores.items())
      logging.info("%s: %s", outcome.title, scores)
    write_json(output / RESULTS_FILE, {**model, **results(outcomes)})
    data = "".join(c if c.isalnum() else "_" for c in outcome.data)[-60:]  # names have 255 bytes
    figures = {f"{outcome.suite}_{data}_{name}": drawn for name, drawn in outcome.figures.items()}
    same = [other for other in outcomes if other.suite == outcome.suite and other.scores]
    if same:
      figures[outcome.suite] = draw(outcome.suite, same, str(model.get("model", "")))
    for name, figure in figures.items():
      Image.fromarray(render(figure)).save(output / f"{name}.png")
  done = sum(bool(outcome.scores) for outcome in outcomes)
  logging.info("%d of %d evaluations done: %s", done, len(outcomes), output / RESULTS_FILE)
  return 0 if done else 1


def results(outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Returns the outcomes for JSON: `suites` by suite and dataset, `means`, `missing`."""
  suites: dict[str, dict[str, Any]] = {}
  for outcome in outcomes:
    if outcome.scores:
      kind = {"features": outcome.features} if outcome.features else {}
      suites.setdefault(outcome.suite, {})[outcome.data] = {**kind, **outcome.scores}
  vtab = [outcome for outcome in outcomes if outcome.suite == "vtab"]
  means = {"means": {"vtab": vtab_means(vtab)}} if vtab else {}
  return {"suites": suites, **means, "missing": {o.title: o.missing for o in outcomes if o.missing}}


def draw(suite: str, outcomes: Sequence[Outcome], model: str) -> Figure:
  """Draws the scores of a suite on its datasets."""
  title = f"{TITLES[suite]}: {model}" if model else TITLES[suite]
  if suite == "few_shot":
    return draw_shots({outcome.data: _curve(outcome.scores) for outcome in outcomes}, title=title)
  groups = {outcome.data: outcome.group for outcome in outcomes if outcome.group}
  means = vtab_means(outcomes) if suite == "vtab" else {}
  accuracies = {outcome.data: outcome.scores["accuracy"] for outcome in outcomes}
  return draw_accuracies(accuracies, title=title, groups=groups, means=means)


def _curve(scores: Mapping[str, float]) -> tuple[list[int], list[float], list[float]]:
  shots = [int(name.removesuffix("_shot")) for name in scores if name.endswith("_shot")]
  return shots, [scores[f"{n}_shot"] for n in shots], [scores[f"{n}_shot_std"] for n in shots]


if __name__ == "__main__":
  cli.run(main, define_flags, renamed={"workdir": "model"})
