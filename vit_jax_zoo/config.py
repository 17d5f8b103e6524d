"""The schema of a config: every field that it may have, and the checks that name a wrong one."""

import difflib
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_jax_zoo.ops.names import unknown_name


def defaults() -> ConfigDict:
  """Returns every field, with what it is when a config does not set it.

  * `seed`: of everything random.
  * `num_steps` or `num_epochs`: the length of the run; one of them must be set, and the steps win.
  * `batch_size`: examples of a training step on all devices together; `eval_batch_size`: the same
    of an evaluation step, by default as large.
  * `accumulation_steps`: into how many micro-batches a step's batch is cut.
  * `model`: `name`, and fields of the model; `task`: `name`, and fields of the task. A field that
    is None takes its value from the training data (`num_classes`, `class_names`).
  * `data.train`: `source`, `split`, `transforms`, and options of the kind of source; `data.eval`:
    the same for each evaluation by name, and for one that is a linear probe the `fit_split` that it
    learns from; `data.loader`: options of both batch makers of `data.pipeline`.
  * `optimizer`: see `train.optimizer`; a task of several players has one such section for each.
  * `ema_decay`: of the average of the parameters; None keeps none.
  * `sharding.mesh`: devices along `data`, `fsdp`, `model`; `sharding.rules`: come before those that
    stand beside the model.
  * `log_every`, `eval_every`, `checkpoint.every`: in steps; 0 is at the end alone.
  * `checkpoint.keep`: how many of the newest stay; `checkpoint.best`: the score that chooses the
    best, "<evaluation>/<score>", by default the first evaluation and the task's own choice.
  * `init_from`: a published checkpoint or a run to start from.
  """
  return ConfigDict(
    {
      "seed": 0,
      "num_steps": placeholder(int),
      "num_epochs": placeholder(float),
      "batch_size": placeholder(int),
      "eval_batch_size": placeholder(int),
      "accumulation_steps": 1,
      "model": {},
      "task": {},
      "data": {"train": {}, "eval": {}, "loader": {"num_workers": 0, "on_corrupt": "error"}},
      "optimizer": {},
      "ema_decay": placeholder(float),
      "sharding": {"mesh": {"data": -1, "fsdp": 1, "model": 1}, "rules": ()},
      "log_every": 50,
      "eval_every": 0,
      "checkpoint": {"every": 0, "keep": 1, "best": placeholder(str)},
      "init_from": placeholder(str),
    }
  )


OPEN_SECTIONS = ("model", "task", "optimizer", "data.train", "data.eval", "data.loader")
"""Sections whose fields belong to the part that they configure, which checks them itself."""


def complete(config: ConfigDict) -> ConfigDict:
  """Returns the config with every default filled in.

  Raises:
    ValueError: one line, about a field that is unknown.
  """
  whole = defaults()
  with whole.ignore_type():
    _fill(whole, config, "")
  return whole


def check_needed(config: ConfigDict) -> None:
  """Raises ValueError if a complete config leaves open what has no default."""
  for key in ("batch_size", "model", "task", "optimizer"):
    if not config[key]:
      raise ValueError(f"the config does not set {key!r}")
  if config.num_steps is None and config.num_epochs is None:
    raise ValueError("the config must set num_steps or num_epochs")


def _fill(whole: ConfigDict, given: ConfigDict, path: str) -> None:
  for key in given:
    name = f"{path}{key}"
    if key not in whole and path.rstrip(".") not in OPEN_SECTIONS:
      raise ValueError(unknown_name(f"field of {_dotted(path)}", str(key), whole))
    if isinstance(whole.get(key), ConfigDict) and isinstance(given[key], ConfigDict):
      _fill(whole[key], given[key], f"{name}.")
    elif given[key] is None and key not in whole and given.get_type(key) is not type(None):
      whole[key] = given.get_ref(key)  # a typed placeholder, which a flag may set
    else:
      whole[key] = given[key]


def _dotted(path: str) -> str:
  return f"config.{path}".rstrip(".")


def load(argument: str) -> ConfigDict:
  """Returns the config that `configs/<system>.py[:variant][,field=value...]` stands for.

  Raises:
    FileNotFoundError: there is no such file; the message names the nearest.
    ValueError: one line, about a misspelt variant, field or value.
  """
  name, _, choice = argument.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    known = sorted(str(p) for p in (path.parent or pathlib.Path()).glob("*.py"))
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise FileNotFoundError(f"there is no config file {name}{hint}")
  spec = importlib.util.spec_from_file_location("vit_jax_zoo_config", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"{name} is not a Python file; a config is configs/<system>.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{name} defines no get_config(arg); see configs/vit.py")
  return module.get_config(choice) if choice else module.get_config()


def check_overrides(config: ConfigDict, flags: Sequence[str]) -> None:
  """Checks the flags `--config.section.field=value` against the config's fields.

  Raises:
    ValueError: one line, about the first that names none.
  """
  for flag in flags:
    section: object = config
    parents: list[str] = []
    for key in _keys(flag):
      if isinstance(section, ConfigDict) and key not in section:
        raise ValueError(unknown_name(f"field of {_dotted('.'.join(parents))}", key, section))
      if not isinstance(section, ConfigDict):
        break
      section = section[key]
      parents.append(key)


def _keys(flag: str) -> Iterator[str]:
  """Yields a, b of `--config.a.b=value`, and of `--config.a.b[2]=value`; nothing of other flags."""
  name = flag.lstrip("-").partition("=")[0]
  if flag.startswith("-") and name.startswith("config."):
    for part in name.split(".")[1:]:
      yield part.partition("[")[0]
