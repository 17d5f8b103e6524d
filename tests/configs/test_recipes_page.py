"""docs/RECIPES.md matches the configs.

To rewrite it: `pytest tests/configs/test_recipes_page.py --update-goldens`.
"""

import importlib
import inspect
import pathlib
import re

from tests.configs.recipes import SYSTEMS
from vit_jax_zoo.config import complete

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "RECIPES.md"

FIRST = ("vit", "igpt", "lambda_resnet", "detr", "ttsr", "fpt", "finetune")


def systems():
  """Returns the config files in the page's order."""
  return *FIRST, *(name for name in SYSTEMS if name not in FIRST)


HEAD = """# Recipes

Written by `pytest tests/configs/test_recipes_page.py --update-goldens`; do not edit.

Each row is one recipe, a function in `configs/`, with its variants. To train one:
`python -m vit_jax_zoo.main --config=configs/<system>.py:<variant>`. Data, length and augmentation
are read from the resolved configs, the other columns from the function's docstring, which has more
detail. Reported results are the papers' unless stated otherwise; "our result" was measured with
this code. Batch sizes are global. There are two RandAugment variants, TensorFlow's and timm's: see
`vit_jax_zoo/data/transforms/augment.py`.
"""

COLUMNS = (
  "variants", "data", "length", "augmentation and regularization", "paper", "hardware",
  "reported result", "our result",
)  # fmt: skip

ENTRIES = (
  "Paper|Data|Weights|Fields|Palette|Evaluation|Differs|Learning|Few|Small|Hardware|Expected|Ours"
)
ENTRY = re.compile(rf"(?P<name>{ENTRIES})(?P<more>[^:]*):\s*(?P<text>.*)")
NOT_RUN = "Not yet run here."


def entries(function):
  """Returns the entries of a docstring by name; indented lines continue an entry."""
  found, name = {}, None
  # Since Python 3.13 the compiler removes a docstring's common indentation.
  for line in inspect.cleandoc(function.__doc__).split("\n"):
    match = ENTRY.match(line)
    if match:
      name, more = match["name"], match["more"].strip(" ,")
      found[name] = f"{more}: {match['text']}" if more else match["text"]
    elif name and line.startswith("  "):
      found[name] += f" {line.strip()}"
    else:
      name = None
  return {name: " ".join(text.replace(NOT_RUN, "").split()) for name, text in found.items()}


TRANSFORMS = {
  "random_resized_crop": "crop",
  "random_crop": "crop",
  "random_window": "crop",
  "random_pair_crop": "crop",
  "random_scale": "scale",
  "random_resize_small": "scale",
  "random_scale_crop": "scale and crop",
  "random_flip": "flip",
  "random_pair_turn": "rotation and flip",
  "random_translate": "translation",
  "random_erasing": "random erasing",
}

RAND_AUGMENTS = {"rand_augment": "TensorFlow", "timm_rand_augment": "timm"}

MIXTURES = {"mixup_alpha": "mixup", "cutmix_alpha": "CutMix"}


def augmentation(config):
  """Returns the random augmentation and regularization of a config as text."""
  parts = []
  for spec in map(dict, config.data.train.transforms):
    name = spec["name"]
    if name in RAND_AUGMENTS:
      layers, magnitude = spec.get("num_layers", 2), spec.get("magnitude", "default")
      parts.append(f"{RAND_AUGMENTS[name]} RandAugment({layers}, {magnitude})")
    elif name in TRANSFORMS:
      parts.append(TRANSFORMS[name])
    elif name == "resize_shorter" and len(spec.get("shorter", ())) > 1:
      parts.append("scale")
    else:
      assert not name.startswith("random"), f"{name} has no word in TRANSFORMS"
  parts += [f"{word} {config.task[f]:g}" for f, word in MIXTURES.items() if config.task.get(f)]
  if config.task.get("label_smoothing"):
    parts.append(f"label smoothing {config.task.label_smoothing:g}")
  drops = {"dropout_rate": "dropout", "drop_path_rate": "stochastic depth"}
  parts += [f"{word} {config.model[f]:g}" for f, word in drops.items() if config.model.get(f)]
  return ", ".join(parts) or "none"


def data(config):
  """Returns the training sources, with the image size where it is fixed."""
  names = [config.data.train, *map(dict, config.data.train.get("extra_sources") or ())]
  names = [spec["source"].removeprefix("tfds:") for spec in names]
  sides = [t["size"] for t in map(dict, config.data.train.transforms) if "size" in t]
  return " + ".join(names) + (f", {sides[-1]} px" if sides else "")


def length(config):
  batch = f"batch {config.batch_size}"
  steps = config.num_steps
  if steps == 1:
    return "evaluation only"
  return f"{steps:,} steps, {batch}" if steps else f"{config.num_epochs:g} epochs, {batch}"


def grouped(by_variant):
  """Returns the text that all variants share, or each text with its variants."""
  groups = {}
  for variant, text in by_variant.items():
    groups.setdefault(text, []).append(variant)
  if len(groups) == 1:
    return next(iter(groups))
  return "<br>".join(f"{text} ({', '.join(names)})" for text, names in groups.items())


def row(variants, configs):
  """Returns the row of one recipe function.

  Args:
    variants: variants of the function by name.
    configs: resolved configs by variant.
  """
  function = next(iter(variants.values()))
  found = entries(function)
  short = _shortened(list(variants))
  by_variant = {short[name]: configs[name] for name in variants}
  ours = "not run" if NOT_RUN in function.__doc__ else found.get("Ours", "see reported result")
  cells = [
    ", ".join(f"`{name}`" for name in variants),
    *(
      grouped({n: column(c) for n, c in by_variant.items()})
      for column in (data, length, augmentation)
    ),
    _first_words(found["Paper"]),
    found["Hardware"].rstrip("."),
    found["Expected"].rstrip("."),
    ours.rstrip("."),
  ]
  if "dataset" in inspect.signature(function).parameters:
    cells[1] += f"; {_first_words(found['Data'])}"
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _first_words(text):
  """Returns the text before the first detail."""
  return re.split(r"(?<=\S)(?:: |; |\. )", text)[0].rstrip(".")


def _shortened(names):
  """Drops the common suffix: `b16_imagenet` and `l16_imagenet` become b16 and l16."""
  if len(names) == 1:
    return {names[0]: names[0]}
  endings = {name.rpartition("_")[2] for name in names}
  cut = f"_{endings.pop()}" if len(endings) == 1 else ""
  return {name: name.removesuffix(cut) for name in names}


def pages(system):
  """Returns the variants of each function, in order."""
  found = {}
  for name, variant in importlib.import_module(f"configs.{system}").VARIANTS.items():
    found.setdefault(inspect.unwrap(variant), {})[name] = variant
  return list(found.values())


def page():
  lines = [HEAD]
  for system in systems():
    module = importlib.import_module(f"configs.{system}")
    lines += [f"## {module.__doc__.strip().splitlines()[0].rstrip('.')}", ""]
    lines += [f"`configs/{system}.py`", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for variants in pages(system):
      lines.append(row(variants, {name: complete(module.get_config(name)) for name in variants}))
    lines.append("")
  return "\n".join(lines)


def test_page_up_to_date(golden_text):
  golden_text(PAGE, page())


def test_every_config_on_page():
  text = PAGE.read_text(encoding="utf-8")
  missing = [
    f"{path.stem}:{name}"
    for path in (ROOT / "configs").glob("*.py")
    for name in getattr(importlib.import_module(f"configs.{path.stem}"), "VARIANTS", ())
    if f"`{name}`" not in text
  ]
  assert missing == []


def test_entries_parsed():
  def function():
    """A page.

    Paper: arXiv:1, table 2: everything
      and more. See: there.
    Expected, at 8 pixels (a: b): 12 %
      of it. Not yet run here.
    Something else.
      which is not an entry.
    """

  assert entries(function) == {
    "Paper": "arXiv:1, table 2: everything and more. See: there.",
    "Expected": "at 8 pixels (a: b): 12 % of it.",
  }
