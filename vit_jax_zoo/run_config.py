"""The config that a run began with: written beside it, and compared when the run is resumed."""

import itertools
import json
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

CONFIG_FILE = "config.json"

HARMLESS = ("log_every", "eval_every", "eval_batch_size", "checkpoint", "data.loader", "sharding")
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
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(as_json(config), indent=1, sort_keys=True) + "\n"
  # Renamed into its place: a kill leaves the old one or the new one, never half of one.
  unfinished = workdir / f"{CONFIG_FILE}.tmp"
  unfinished.write_text(text)
  unfinished.replace(workdir / CONFIG_FILE)


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
