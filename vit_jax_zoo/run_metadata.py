"""What a run began with, written beside it: its config, and what it took from its data.

The config is compared when the run is resumed. What came from the data, above all the names of the
classes, is for those who use the model when the data are elsewhere.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_jax_zoo.data.sources.base import DatasetInfo
from vit_jax_zoo.training import atomic_write as whole_file
from vit_jax_zoo.training import disk_errors as full_disk

CONFIG_FILE, DATA_FILE = "config.json", "data.json"

HARMLESS = (
  "log_every", "eval_every", "eval_batch_size", "checkpoint", "data.loader", "sharding", "recipe",
)  # fmt: skip
"""Fields that may change when a run is resumed: what it computes does not depend on them."""


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON has it: nested dicts, lists, numbers, strings."""
  return json.loads(config.to_json_best_effort())


def check_config_unchanged(config: ConfigDict, workdir: epath.Path) -> None:
  """Raises ValueError if the run in `workdir` began with another config; names what differs."""
  before = _remembered(workdir)
  found = [] if before is None else _differences(before, as_json(config))
  changed = [difference for difference in found if not difference.startswith(HARMLESS)]
  if changed:
    raise ValueError(
      f"{workdir} holds a run of another config ({'; '.join(changed[:5])}); name another "
      "--workdir, or add --allow_config_change to go on with the new values"
    )


def remember_config(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes the config beside the run: for `check_config_unchanged`, `predict` and people."""
  if _remembered(workdir) == as_json(config):
    return
  _write(as_json(config), workdir / CONFIG_FILE)


def remember_data(info: DatasetInfo, batch: Mapping[str, np.ndarray], workdir: epath.Path) -> None:
  """Writes beside the run what it took from its data.

  Args:
    info: of the training data.
    batch: of training examples; their shapes are kept.
    workdir: of the run.
  """
  shapes = {key: list(np.shape(value)[1:]) for key, value in batch.items()}
  _write({**dataclasses.asdict(info), "shapes": shapes}, workdir / DATA_FILE)


@dataclasses.dataclass(frozen=True)
class RunData:
  """What a run took from its data.

  Attributes:
    num_classes: see `DatasetInfo`.
    class_names: see `DatasetInfo`.
    shapes: of one training example's arrays; empty for runs that did not keep them.
  """

  num_classes: int | None = None
  class_names: tuple[str, ...] = ()
  shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

  def info(self, name: str) -> DatasetInfo:
    """Returns it as what is known of a source, with no examples."""
    return DatasetInfo(name, 0, self.num_classes, self.class_names)


def recall(workdir: epath.Path) -> tuple[dict[str, Any], RunData]:
  """Returns the config of a run, and what it took from its data.

  Raises:
    FileNotFoundError: the run has no config beside it.
    ValueError: it cannot be read.
  """
  config = _read(workdir / CONFIG_FILE)
  if config is None:
    raise FileNotFoundError(
      f"there is no {CONFIG_FILE} in {workdir}; give the folder of a run, its --workdir"
    )
  return config, recall_data(workdir)


def recall_data(workdir: epath.Path) -> RunData:
  """Returns what the run in `workdir` took from its data; nothing, if there is no run."""
  data = _read(workdir / DATA_FILE) or {}
  shapes = {key: tuple(shape) for key, shape in data.get("shapes", {}).items()}
  names = tuple(data.get("class_names") or ())
  return RunData(data.get("num_classes"), names, shapes)


def main_evaluation(evaluations: Mapping[str, Any]) -> str | None:
  """Returns the name of the evaluation that stands for a run, where nothing else is said.

  The first by name; one that predicts before those that probe features.
  """
  return min(evaluations, key=lambda name: ("fit_split" in evaluations[name], name), default=None)


def asks_data(*sections: Mapping[str, Any] | ConfigDict) -> bool:
  """Returns whether any section has a field that `fill_from_data` would fill."""
  asked = [key for section in sections for key, value in section.items() if value is None]
  return any(hasattr(RunData(), key) for key in asked)


def fill_from_data(fields: Mapping[str, Any], data: DatasetInfo | RunData) -> dict[str, Any]:
  """Returns a section's fields, with those that are None and that the data knows taken from it."""
  return {
    key: getattr(data, key) if value is None and hasattr(data, key) else value
    for key, value in fields.items()
  }


def _write(content: Any, file: epath.Path) -> None:
  """Writes JSON and renames it into its place: a kill leaves the old one, or the new one."""
  with full_disk.explained(f"{file} cannot be written"):
    file.parent.mkdir(parents=True, exist_ok=True)
    whole_file.write(file, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _read(file: epath.Path) -> Any:
  try:
    return json.loads(file.read_text()) if file.exists() else None
  except ValueError as error:
    raise ValueError(f"{file} is not JSON ({error})") from None


def _remembered(workdir: epath.Path) -> dict[str, Any] | None:
  path = workdir / CONFIG_FILE
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except ValueError:
    logging.warning("%s cannot be read, and is written anew", path)
    return None


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
  if isinstance(before, dict) and isinstance(after, dict):
    keys = sorted(before.keys() | after.keys())
    found = (_differences(before.get(k), after.get(k), f"{path}.{k}".lstrip(".")) for k in keys)
    return list(itertools.chain.from_iterable(found))
  return [] if before == after else [f"{path}: {before} -> {after}"]
