"""docs/MODELS.md is what the code says: `pytest tests/test_models_page.py --update-goldens`."""

import json
import pathlib

from tests.conftest import GOLDENS
from vit_jax_zoo.registry import FAMILIES, list_models
from vit_jax_zoo.weights.model_index import ENTRIES, PAPER_SCORES

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "MODELS.md"

HEAD = """# Models and published weights

Written by `pytest tests/test_models_page.py --update-goldens`; do not edit.

`zoo.create_model(name)` makes a model of the first table, `zoo.load_pretrained(name)` one of the
second with its weights. Classifiers are counted with 1000 classes, iGPT without a head, DETR and
R-CNN with COCO's, segmentation with Cityscapes's; frozen statistics are no parameters. Scores are
their publishers', ImageNet-1k top-1 unless they say otherwise; none of them was measured here.

iGPT's nats are checked on ImageNet, prepared by `python -m vit_jax_zoo.data.prepare`, with
`python -m vit_jax_zoo.main --evaluate_only --config=configs/igpt.py:s_nats` (or `m_nats`, `l_nats`;
add `,init_from=igpt_s_imagenet_hub` for Hugging Face's file, or a path). It prints `test/nats`.
"""

COUNTS = ("param_counts", "lambda_resnet_parameters_all", "rcnn_parameters")
TTSR = {"ttsr": 6_729_603}  # tests/models/test_ttsr.py


def counts():
  files = [json.loads((GOLDENS / f"{name}.json").read_text()) for name in COUNTS]
  return TTSR | {name: count for file in files for name, count in file.items()}


def family_order(name):
  """Sorts names by family, in the registry's order, and within it."""
  return next(i for i, family in enumerate(FAMILIES) if name.startswith(family)), name


def page():
  known = counts()
  lines = [HEAD, "## Models", "", "| name | parameters | the paper's score | says |"]
  lines.append("|---|---|---|---|")
  for name in sorted(list_models(), key=family_order):
    score, source = PAPER_SCORES.get(name, ("–", "–"))
    count = f"{known[name]:,}" if name in known else "–"
    lines.append(f"| `{name}` | {count} | {score} | {source} |")
  lines += ["", "## Published weights", ""]
  lines += [
    "| name | model | parameters | published score | says | where |",
    "|---|---|---|---|---|---|",
  ]
  for name, entry in ENTRIES.items():
    where = entry.hub or entry.urls[0].split("/")[2]
    count = f"{known[entry.model]:,}" if entry.model in known else "–"
    lines.append(
      f"| `{name}` | `{entry.model}` | {count} | {entry.score} | {entry.source} | {where} |"
    )
  return "\n".join(lines) + "\n"


def test_the_page_is_current(golden_text):
  golden_text(PAGE, page())


def test_every_published_variant_is_counted():
  known = counts()
  missing = {entry.model for entry in ENTRIES.values()} - known.keys()
  assert not missing
  assert PAPER_SCORES.keys() <= set(list_models())
