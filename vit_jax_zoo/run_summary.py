"""What a run says before its first step: of its batch, its data's classes, its parameters.

Nothing here changes what is trained. Pictures and texts go to TensorBoard and to `figures/`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from clu import parameter_overview
from jaxtyping import Int, Integer
from ml_collections import ConfigDict

from vit_jax_zoo.data.sources.base import Source
from vit_jax_zoo.figures.class_balance import draw_class_balance
from vit_jax_zoo.run_metadata import as_json
from vit_jax_zoo.tasks.base import Task
from vit_jax_zoo.training.compiled_steps import Program
from vit_jax_zoo.training.distributed import is_primary
from vit_jax_zoo.training.lr_scaling import advise
from vit_jax_zoo.training.metric_writer import MetricWriter

MAX_LISTED = 12
"""So many classes are listed with their counts; of more, the smallest and the largest."""

UNEVEN = 10
"""Classes are called uneven where the largest has so many times the examples of the smallest."""


def introduce(
  config: ConfigDict,
  program: Program,
  sources: Mapping[str, Source],
  batch: Mapping[str, np.ndarray],
  writer: MetricWriter,
) -> None:
  """Logs what is about to be trained, and draws the first batch and the classes.

  Args:
    config: complete.
    program: the run's.
    sources: "train", and those of the evaluations by name.
    batch: this process's part of the first one.
    writer: takes texts and figures.
  """
  table = parameter_overview.get_parameter_overview(
    program.abstract_state.params, include_stats=False
  )
  logging.info("parameters:\n%s", table)
  if not is_primary():
    return
  for advice in advise(config.to_dict()):
    logging.log(logging.WARNING if advice.is_warning else logging.INFO, advice.text)
  plain = as_json(config)
  writer.write_text(0, {"config": f"```\n{json.dumps(plain, indent=1)}\n```"})
  writer.write_hparams(plain)
  writer.write_figures(0, _figures(program.task, sources, batch))


def _figures(
  task: Task, sources: Mapping[str, Source], batch: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  figures: dict[str, Any] = {f"train_{k}": v for k, v in task.batch_figures(batch).items()}
  counts = count_classes(sources)
  names = sources["train"].info.class_names
  for line in describe_balance(counts, names):
    logging.info(line)
  for line in find_imbalance(counts, names):
    logging.warning(line)
  return figures | ({"class_balance": draw_class_balance(counts, names)} if counts else {})


def count_classes(sources: Mapping[str, Source]) -> dict[str, Int[np.ndarray, " k"]]:
  """Returns the examples of each class, for those sources that know labels without reading."""
  counts = {}
  for name, source in sources.items():
    labels, classes = source.labels(), source.info.num_classes
    if labels is not None and classes:
      counts[name] = np.bincount(labels, minlength=classes)
  return counts


def describe_balance(
  counts: Mapping[str, Integer[np.ndarray, " k"]], class_names: Sequence[str]
) -> list[str]:
  """Returns a line for each split: how many examples of which class.

  >>> describe_balance({"train": np.array([3, 4])}, ("ant", "bee"))
  ['train: 7 examples of 2 classes: ant 3, bee 4']
  """
  lines = []
  for split, values in counts.items():
    named = [f"{_name(i, class_names)} {count}" for i, count in enumerate(values)]
    if len(named) > MAX_LISTED:
      order = np.argsort(values, kind="stable")
      ends = [named[i] for i in (*order[:3], *order[-3:])]
      named = [*ends[:3], "...", *ends[3:]]
    total = int(np.sum(values))
    lines.append(f"{split}: {total} examples of {len(values)} classes: {', '.join(named)}")
  return lines


def find_imbalance(
  counts: Mapping[str, Integer[np.ndarray, " k"]], class_names: Sequence[str]
) -> list[str]:
  """Returns a line for each thing about the training classes that a user should know."""
  values = counts.get("train")
  if values is None:
    return []
  if len(values) == 1:
    return [
      f"there is one class alone, {_name(0, class_names)}: every answer will be right, and nothing "
      "is learned; a folder of images needs a folder inside for each class"
    ]
  empty = [_name(i, class_names) for i, count in enumerate(values) if not count]
  if empty:
    listed = ", ".join(empty[:MAX_LISTED]) + (", ..." if len(empty) > MAX_LISTED else "")
    if len(empty) == 1:
      return [f"no training example of one class: {listed}; it cannot be learned"]
    return [f"no training example of {len(empty)} classes: {listed}; they cannot be learned"]
  smallest, largest = int(np.argmin(values)), int(np.argmax(values))
  if values[largest] < UNEVEN * values[smallest]:
    return []
  return [
    f"the classes are uneven: {_name(largest, class_names)} has {values[largest]} training "
    f"examples, {_name(smallest, class_names)} {values[smallest]}; look at mean_class_accuracy "
    "and the confusion matrix beside the accuracy"
  ]


def _name(index: int, class_names: Sequence[str]) -> str:
  return class_names[index] if class_names else f"class {index}"
