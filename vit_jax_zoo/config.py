"""The schema of a config: every field that it may have, and the checks that name a wrong one."""

import ast
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_jax_zoo.data.pipeline import LOADER_FIELDS
from vit_jax_zoo.errors import check_names, unknown_name


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
    the same for each evaluation by name. One that asks the features has a `fit_split` to learn from
    and `probe`, `name` (see `evaluation.feature_probes`; "linear" by default) and its fields; its
    classes may be others than those that are trained. `mixed_with` in either: further sources of
    the same classes, each with `source`, `split` and options; `repeats` in `data.train`: of each
    example in a batch; `data.loader`: options of both batch makers of `data.pipeline`.
  * `optimizer`: see `train.optimizer`; a task of several players has one such section for each.
  * `ema_decay`: of the average of the parameters and statistics; None keeps none.
  * `sharding.mesh`: devices along `data`, `fsdp`, `model`; `sharding.rules`: come before those that
    stand beside the model.
  * `log_every`, `eval_every`, `checkpoint.every`: in steps; 0 is at the end alone. The last two may
    be shares of the run: 0.05 is twenty times.
  * `checkpoint.keep`: how many of the newest stay; `checkpoint.best`: the score that chooses the
    best, "<evaluation>/<score>", by default the first evaluation that is no probe, and the task's
    own choice; `checkpoint.best_mode`: whether a higher ("max") or a lower one ("min") is better;
    `checkpoint.score_best`: at the end, the best is scored on all evaluations, as "best/...".
  * `explain`: with each evaluation, also draw what the model shows of its inside: attention,
    lambdas, positions, filters.
  * `init_from`: a published checkpoint or a run to start from.
  * `recipe`: the batch size that the recipe's numbers are for, and its `learning_rates` by player:
    where a run departs from them, `train.batch_rule` says what is due. They change nothing.
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
      "checkpoint": {
        "every": 0,
        "keep": 1,
        "best": placeholder(str),
        "best_mode": "max",
        "score_best": False,
      },
      "explain": False,
      "init_from": placeholder(str),
      "recipe": {"batch_size": placeholder(int), "learning_rates": {}},
    }
  )


OPEN_SECTIONS = (
  "model", "task", "optimizer", "data.train", "data.eval", "data.loader", "recipe.learning_rates",
)  # fmt: skip
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


def check_values(config: ConfigDict) -> None:
  """Checks what can be checked of a complete config without knowing its parts.

  Raises:
    ValueError: one line, about what is needed and not set, or is out of its range.
  """
  for key in ("batch_size", "model", "task", "optimizer"):
    if config[key] is None or config[key] == ConfigDict():
      raise ValueError(f"the config does not set {key!r}")
  check_names("field of config.data.loader", config.data.loader, LOADER_FIELDS)
  if config.num_steps is None and config.num_epochs is None:
    raise ValueError("the config must set num_steps or num_epochs")
  for name, least in _LEAST.items():
    _check_at_least(config, name, least)
  if config.num_epochs is not None and not config.num_epochs > 0:
    raise ValueError(f"num_epochs is {config.num_epochs}; expected a number above 0")
  if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
    raise ValueError(f"ema_decay is {config.ema_decay}; expected a number in [0, 1), or None")
  if config.checkpoint.best_mode not in ("max", "min"):
    raise ValueError(unknown_name("checkpoint.best_mode", config.checkpoint.best_mode, _MODES))


_MODES = ("max", "min")
_LEAST = {
  "batch_size": 1,
  "eval_batch_size": 1,
  "num_steps": 1,
  "accumulation_steps": 1,
  "log_every": 0,
  "eval_every": 0,
  "checkpoint.every": 0,
  "checkpoint.keep": 1,
}


_SHARES = ("eval_every", "every", "warmup_steps", "cooldown_steps", "timescale")
"""Counts of steps that may be shares of all, in whatever section they stand."""


def _check_at_least(config: ConfigDict, name: str, least: int) -> None:
  value = config
  for key in name.split("."):
    value = value[key]
  may_be_share = name.rpartition(".")[2] in _SHARES
  if may_be_share and isinstance(value, float):
    if 0 < value < 1:
      return
    value = int(value) if value.is_integer() else value  # a field of shares keeps 100 as 100.0
  if value is not None and not (isinstance(value, int) and value >= least):
    share = ", or a share of the run, such as 0.05" if may_be_share else ""
    raise ValueError(f"{name} is {value}; expected a whole number, at least {least}{share}")


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
    if not (known or path.is_absolute()):
      hint = f" in {pathlib.Path.cwd()}; change to the folder that holds {path.parts[0]}"
    raise FileNotFoundError(f"there is no config file {name}{hint}")
  spec = importlib.util.spec_from_file_location("vit_jax_zoo_config", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"{name} is not a Python file; a config is configs/<system>.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{name} defines no get_config(arg); see configs/vit.py")
  return module.get_config(choice) if choice else module.get_config()


def load_with_overrides(argument: str, overrides: Sequence[str]) -> ConfigDict:
  """Returns the complete config of `--config=argument` with the overrides applied.

  Raises:
    FileNotFoundError: there is no such config file.
    ValueError: one line, about a name or value that cannot be, or an argument that is no override.
  """
  config = complete(load(argument))
  others = apply_overrides(config, overrides)
  if others:
    raise ValueError(f"unexpected argument {others[0]!r}; options begin with --")
  return config


def apply_overrides(config: ConfigDict, flags: Sequence[str]) -> list[str]:
  """Sets the fields that flags of the form `--config.section.field=value` name, in place.

  A value is read as Python reads it (`3e-4`, `None`, `True`, `[1, 2]`), or else as text, and must
  be of the type that the field has. In the `OPEN_SECTIONS` fields may be new: the model, task,
  source or optimizer that they belong to says whether it has them.

  Returns:
    The other flags.

  Raises:
    ValueError: one line, about a field that is unknown, or a value of another type.
  """
  others = []
  for flag in flags:
    name, equals, text = flag.lstrip("-").partition("=")
    if not (flag.startswith("-") and name.startswith("config.")):
      others.append(flag)
    elif not equals:
      raise ValueError(f"{flag} has no value; write {flag}=value")
    else:
      _override(config, name.split(".")[1:], text)
  return others


def _override(config: ConfigDict, keys: Sequence[str], text: str) -> None:
  section, path = config, ""
  for key in keys[:-1]:
    if not isinstance(section.get(key), ConfigDict):
      raise ValueError(unknown_name(f"section of {_dotted(path)}", key, _sections(section)))
    section, path = section[key], f"{path}{key}."
  key = keys[-1]
  if isinstance(section.get(key), ConfigDict):
    fields = ", ".join(f"--{_dotted(path)}.{key}.{name}" for name in section[key])
    raise ValueError(f"--{_dotted(path)}.{key} is a section; set its fields: {fields}")
  is_open = path.rstrip(".").startswith(OPEN_SECTIONS)
  if key not in section and not is_open:
    raise ValueError(unknown_name(f"field of {_dotted(path)}", key, section))
  kind = section.get_type(key) if key in section else type(None)
  value = _parse(f"--{_dotted(path)}.{key}", text, kind)
  with section.unlocked(), section.ignore_type():
    section[key] = value


def _sections(config: ConfigDict) -> list[str]:
  return [key for key in config if isinstance(config[key], ConfigDict)]


def _parse(flag: str, text: str, kind: type) -> object:
  """Reads a value for a field of this type; one of no type, or None, takes any."""
  try:
    value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
  except (ValueError, SyntaxError):
    value = text
  if value is None or kind is type(None):
    return value
  if kind is str:
    return text
  if flag.rpartition(".")[2] in _SHARES and {kind, type(value)} <= {int, float}:
    return value
  if kind is float and type(value) is int:
    return float(value)
  if issubclass(kind, list | tuple) and isinstance(value, list | tuple):
    return kind(value)
  if type(value) is not kind:
    raise ValueError(f"{flag}={text}: expected {_KINDS.get(kind, kind.__name__)}")
  return value


_KINDS = {
  bool: "True or False", int: "a whole number", float: "a number", list: "a list", tuple: "a list",
}  # fmt: skip
