"""docs/MODELS.md matches the code.

To rewrite it: `pytest tests/test_models_page.py --update-goldens`.
"""

import json
import pathlib

from tests.conftest import GOLDENS
from vit_jax_zoo.registry import list_models, load_from_each, model_classes
from vit_jax_zoo.weights.hub import entries

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "MODELS.md"

HEAD = """# Models and published weights

Written by `pytest tests/test_models_page.py --update-goldens`; do not edit.

`vit_jax_zoo.create_model(name)` creates a model of the first table, and
`vit_jax_zoo.load_pretrained(name)` loads a model of the second table with its weights. Parameters
are counted with 1,000 classes for classifiers, without a head for iGPT, with COCO's classes for
DETR and R-CNN, and with Cityscapes' for segmentation; frozen statistics are not counted. Scores are
the publishers', ImageNet-1k top-1 unless stated otherwise; none was measured here.

To check iGPT's likelihood on ImageNet, prepared by `python -m vit_jax_zoo.data.prepare`, run
`python -m vit_jax_zoo.main --eval_only --config=configs/igpt.py:s_eval_nll` (or `m_eval_nll`,
`l_eval_nll`; append `,init_from=igpt_s_imagenet_hub` for Hugging Face's file, or a path). It
prints `test/nats`.
"""

COUNTS = ("param_counts", "lambda_resnet_parameters_all", "rcnn_parameters")
TTSR = {"ttsr": 6_729_603}  # tests/systems/ttsr/test_model.py


def counts():
  files = [json.loads((GOLDENS / f"{name}.json").read_text()) for name in COUNTS]
  return TTSR | {name: count for file in files for name, count in file.items()}


def family_order(name):
  """Sort key: the family in the registry's order, then the name."""
  return next(i for i, family in enumerate(model_classes()) if name.startswith(family)), name


def paper_scores():
  """Reported score and its source by model name."""
  return {name: row for table in load_from_each("paper_scores") for name, row in table.items()}


def page():
  known = counts()
  lines = [HEAD, "## Models", "", "| name | parameters | reported score | source |"]
  lines.append("|---|---|---|---|")
  for name in sorted(list_models(), key=family_order):
    score, source = paper_scores().get(name, ("–", "–"))
    count = f"{known[name]:,}" if name in known else "–"
    lines.append(f"| `{name}` | {count} | {score} | {source} |")
  lines += ["", "## Published weights", ""]
  lines += [
    "| name | model | parameters | published score | source | host |",
    "|---|---|---|---|---|---|",
  ]
  for name, entry in entries().items():
    where = entry.hub or entry.urls[0].split("/")[2]
    count = f"{known[entry.model]:,}" if entry.model in known else "–"
    model = f"`{entry.model}`" if entry.model else "–"
    row = (f"`{name}`", model, count, entry.score, entry.source, where)
    lines.append(f"| {' | '.join(row)} |")
  return "\n".join(lines) + "\n"


def test_page_up_to_date(golden_text):
  golden_text(PAGE, page())


def test_published_variants_have_counts():
  known = counts()
  missing = {entry.model for entry in entries().values() if entry.model} - known.keys()
  assert not missing
  assert paper_scores().keys() <= set(list_models())
