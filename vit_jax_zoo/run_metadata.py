"""Run metadata: config.json and data.json, saved with a run and compared when it resumes."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from vit_jax_zoo.config import rename_fields
from vit_jax_zoo.data.sources.base import DatasetInfo, Source
from vit_jax_zoo.training import disk

CONFIG_FILE, DATA_FILE = "config.json", "data.json"

HARMLESS = (
  "log_every", "logging", "eval_every", "eval_batch_size", "checkpoint", "data.loader", "sharding",
  "recipe",
)  # fmt: skip
"""Fields that may change when a run resumes: its results do not depend on them."""


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON represents it: nested dicts, lists, numbers, strings."""
  return json.loads(config.to_json_best_effort())


def check_unchanged(config: ConfigDict, info: DatasetInfo | None, workdir: epath.Path) -> None:
  """Raises ValueError if config, or classes (if `info` is given), differ from the run's."""
  before, after = _read_config(workdir), as_json(config)
  changed = [] if before is None else _differences(before, after)
  names = load_data(workdir).class_names
  if info is not None and names and names != info.class_names:
    pairs = itertools.zip_longest(names, info.class_names)
    index, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    changed.append(f"class {index}: {old} -> {new}")
  if changed:
    remedy = "use another --workdir, or --allow_config_change to resume with the new values"
    raise ValueError(f"{workdir}: the run has another config ({'; '.join(changed[:5])}); {remedy}")


def save_config(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes the complete config of a run."""
  if _read_config(workdir) != as_json(config):
    _write(as_json(config), workdir / CONFIG_FILE)


def save_data(info: DatasetInfo, batch: Mapping[str, np.ndarray], workdir: epath.Path) -> None:
  """Writes the metadata of the training data; a resumed run keeps the shapes of its start."""
  shapes = load_data(workdir).shapes or {k: np.shape(v)[1:] for k, v in batch.items()}
  content = {**dataclasses.asdict(info), "shapes": {k: list(v) for k, v in shapes.items()}}
  if disk.read_json(workdir / DATA_FILE) != json.loads(json.dumps(content)):
    _write(content, workdir / DATA_FILE)


@dataclasses.dataclass(frozen=True)
class RunData:
  """Metadata of a run's training data, as of `DatasetInfo`."""

  num_classes: int | None = None
  class_names: tuple[str, ...] = ()
  shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # of an example
  stuff_from: int | None = None

  def info(self, name: str) -> DatasetInfo:
    """Returns the metadata of a source without examples."""
    return DatasetInfo(name, 0, self.num_classes, self.class_names, stuff_from=self.stuff_from)


def load_run(workdir: epath.Path) -> tuple[dict[str, Any], RunData]:
  """Returns the config of a run, with the current field names, and the metadata of its data."""
  if (config := disk.read_json(workdir / CONFIG_FILE)) is None:
    raise FileNotFoundError(f"{workdir}: no {CONFIG_FILE}; expected the folder of a run")
  for section in ("model", "task", "data", "checkpoint"):
    if not isinstance(config.get(section), dict):
      raise ValueError(f"{workdir / CONFIG_FILE}: no field {section!r}; expected a run's config")
  return rename_fields(config), load_data(workdir)


def load_data(workdir: epath.Path) -> RunData:
  """Returns the metadata of the training data; empty if there is no run."""
  data = disk.read_json(workdir / DATA_FILE) or {}
  shapes = {key: tuple(shape) for key, shape in data.get("shapes", {}).items()}
  names = tuple(data.get("class_names") or ())
  return RunData(data.get("num_classes"), names, shapes, data.get("stuff_from"))


def main_evaluation(evaluations: Mapping[str, Any]) -> str | None:
  """Returns the name of the default evaluation: the first by name that is no feature probe."""
  return min(evaluations, key=lambda name: ("fit_split" in evaluations[name], name), default=None)


def needs_data(*sections: Mapping[str, Any] | ConfigDict) -> bool:
  """Returns whether any section has a field that `fill_from_data` would fill."""
  unset = [key for section in sections for key, value in section.items() if value is None]
  return any(hasattr(RunData(), key) for key in unset)


def fill_from_data(fields: Mapping[str, Any], data: DatasetInfo | RunData) -> dict[str, Any]:
  """Returns a section's fields; those that are None are filled in from the data's metadata."""
  return {k: getattr(data, k) if v is None and hasattr(data, k) else v for k, v in fields.items()}


def fingerprint(source: Source) -> str:
  """Returns name and size of a source; hashes of names, annotations, classes, some file sizes."""
  count = len(source)  # the sizes are those of 64 examples: all take minutes on network disks
  files = _hash(source.info.annotations, *map(source.example_name, range(count)))
  sizes = _hash(*(_file_sizes(source, index) for index in range(0, count, max(1, count // 64))))
  classes = _hash(*source.info.class_names)
  return f"{source.info.name}, {count} examples, files {files}, sizes {sizes}, classes {classes}"


def _file_sizes(source: Source, index: int) -> str:
  try:
    return str([len(value) for value in source[index].values() if isinstance(value, bytes)])
  except (OSError, ValueError):  # which `data.loader.on_corrupt` may skip
    return "unreadable"


def code_version() -> str:
  """Returns a hash of the package's files."""
  return _hash(*(path.read_text() for path in sorted(pathlib.Path(__file__).parent.rglob("*.py"))))


def _hash(*texts: str) -> str:
  return hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=6).hexdigest()


def _write(content: Any, file: epath.Path) -> None:
  with disk.explained(f"{file} cannot be written"):
    file.parent.mkdir(parents=True, exist_ok=True)
    disk.write(file, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _read_config(workdir: epath.Path) -> dict[str, Any] | None:
  try:
    config = disk.read_json(workdir / CONFIG_FILE)
  except ValueError as error:
    logging.warning("%s; it is overwritten", error)
    return None
  return None if config is None else rename_fields(config)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  flat = [traverse_util.flatten_dict(x, sep=".") for x in (before, after)]
  pairs = {path: [x.get(path) for x in flat] for path in sorted(flat[0].keys() | flat[1].keys())}
  found = {k: v for k, v in pairs.items() if v[0] != v[1] and not k.startswith(HARMLESS)}
  return [f"{path}: {old} -> {new}" for path, (old, new) in found.items()]
