"""Logs the parameter table, class counts, learning-rate advice and first-batch figures."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from absl import logging
from clu import parameter_overview
from jaxtyping import Int, Integer
from ml_collections import ConfigDict

from vit_jax_zoo.data.sources.base import Source
from vit_jax_zoo.figures.classification import draw_class_balance
from vit_jax_zoo.run_metadata import as_json
from vit_jax_zoo.training.distributed import is_primary
from vit_jax_zoo.training.lr_scaling import advise
from vit_jax_zoo.training.metric_writer import MetricWriter
from vit_jax_zoo.training.train_step import Program

Counts: TypeAlias = Mapping[str, Integer[np.ndarray, " k"]]  # examples of each class, by split
MAX_LISTED = 12  # of more classes, only the counts of the smallest and largest are logged
IMBALANCED = 10  # ratio of the sizes of the largest and smallest class from which to warn


def log_summary(
  config: ConfigDict,
  program: Program,
  sources: Mapping[str, Source],
  batch: Mapping[str, np.ndarray],
  writer: MetricWriter,
) -> None:
  """Logs a new run's model and data; writes config and figures. `batch` is its first one."""
  params = program.abstract_state.params
  table = parameter_overview.get_parameter_overview(params, include_stats=False)
  logging.info("parameters:\n%s", table)
  if not is_primary():
    return
  for level, text in advise(config.to_dict()):
    logging.log(level, text)
  writer.write_config(as_json(config))
  figures = {f"train_{k}": v for k, v in program.task.batch_figures(batch).items()}
  info, counts = sources["train"].info, count_classes(sources)
  for line in describe_balance(counts, info.class_names):
    logging.info(line)
  for line in [*program.task.check_data(info), *find_imbalance(counts, info.class_names)]:
    logging.warning(line)
  if counts:
    figures["class_balance"] = draw_class_balance(counts, info.class_names)
  writer.write_figures(0, figures)


def count_classes(sources: Mapping[str, Source]) -> dict[str, Int[np.ndarray, " k"]]:
  """Returns the number of examples of each class, for sources with labels in their index."""
  counts = {}
  for name, source in sources.items():
    labels, classes = source.labels(), source.info.num_classes
    if labels is not None and classes:
      counts[name] = np.bincount(labels, minlength=classes)
  return counts


def describe_balance(counts: Counts, class_names: Sequence[str]) -> list[str]:
  """Returns a line for each split with its number of examples by class.

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


def find_imbalance(counts: Counts, class_names: Sequence[str]) -> list[str]:
  """Returns warnings about empty classes and class imbalance of the training data."""
  values = counts.get("train")
  if values is None:
    return []
  if len(values) == 1:
    return [f"only one class found ({_name(0, class_names)}); put each class in its own folder"]
  empty = [_name(i, class_names) for i, count in enumerate(values) if not count]
  if empty:
    listed = ", ".join(empty[:MAX_LISTED]) + (", ..." if len(empty) > MAX_LISTED else "")
    return [f"classes without training images ({len(empty)}): {listed}"]
  smallest, largest = int(np.argmin(values)), int(np.argmax(values))
  if values[largest] < IMBALANCED * values[smallest]:
    return []
  return [
    f"class imbalance: {_name(largest, class_names)} has {values[largest]} training images, "
    f"{_name(smallest, class_names)} {values[smallest]}; report mean_class_accuracy"
  ]


def _name(index: int, class_names: Sequence[str]) -> str:
  return class_names[index] if class_names else f"class {index}"
