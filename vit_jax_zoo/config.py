"""Loads configs, fills in defaults, applies command-line overrides, and checks field names."""

import ast
import contextlib
import difflib
import fnmatch
import functools
import importlib.util
import operator
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from vit_jax_zoo.data.pipeline import LOADER_FIELDS
from vit_jax_zoo.errors import check_names, unknown_name
from vit_jax_zoo.registry import systems
from vit_jax_zoo.training.loggers import check_loggers
from vit_jax_zoo.training.optim import optimizer_fields


def defaults() -> ConfigDict:
  """Returns every field with its default (None: unset). Evaluations with `fit_split` are probes."""
  return ConfigDict(
    {
      "seed": 0,
      "num_steps": placeholder(int),  # the length of the run: steps, which take precedence, ...
      "num_epochs": placeholder(float),  # ... or epochs
      "batch_size": placeholder(int),  # global, of a training step
      "eval_batch_size": placeholder(int),  # default: the same
      "accumulation_steps": 1,  # micro-batches of a batch
      # `name`, and its fields. One that is None is filled in from the training data.
      "model": {},
      "task": {},
      "data": {
        # `source`, `split`, `transforms`, options of the kind of source; `extra_sources` of the
        # same classes, each with `source`, `split` and options; `aug_repeats` (repeated
        # augmentation) in training; `metrics`, the scores to report, in evaluations.
        "train": {},
        "eval": {},  # by name
        "loader": {"num_workers": 0, "on_corrupt": "error"},  # see `data.pipeline`
      },
      "optimizer": {},  # see `training.optim`; or a section for each optimizer group
      "ema_decay": placeholder(float),  # of parameters and statistics
      # Devices along each axis; rules that precede those of the model.
      "sharding": {"mesh": {"data": -1, "fsdp": 1, "model": 1}, "rules": ()},
      # In steps; 0: at the end only. The last two may be fractions of the run: 0.05 is 20 times.
      # The state is also saved before each evaluation.
      "log_every": 50,
      "logging": ("tensorboard",),  # also "wandb", "mlflow", "comet": see `training.loggers`
      "eval_every": 0,
      "checkpoint": {
        "every": 0,
        "keep": 1,  # number of the newest ones
        # "<evaluation>/<score>", by default the task's `best_metric` of the first evaluation that
        # is no probe; whether a higher ("max") or lower ("min") score is better.
        "best": placeholder(str),
        "best_mode": "max",
        "eval_best_at_end": False,  # evaluate the best, as "best/..."
      },
      "explain": False,  # also draw attention maps and other intermediates
      "init_from": placeholder(str),  # a published checkpoint or a run
      # Of the unchanged recipe, for the advice of `training.lr_scaling`.
      "recipe": {"batch_size": placeholder(int), "learning_rates": {}},
    }
  )


OPEN_SECTIONS = (
  "model", "task", "optimizer", "data.train", "data.eval", "data.loader", "recipe.learning_rates",
)  # fmt: skip
"""Sections whose fields are checked by the part that they configure."""

RENAMED = (
  ("checkpoint.score_best", "eval_best_at_end"),
  ("data.*mixed_with", "extra_sources"),
  ("data.train.repeats", "aug_repeats"),
  ("data.*label_rule", "derived_labels"),
  ("data.*transforms.share", "fraction"),
  ("task.cutmix_share", "cutmix_fraction"),
)
"""Patterns of the paths of renamed fields, and their new names; systems have more. Saved runs are
read with the new names; config files and flags with an old one raise an error with the new one."""

REMOVED = {
  "model*.remat_stages": (..., "accumulation_steps reduces memory use"),
  "model*.zero_init_last_scale": (..., "it is always True"),
  "data.*transforms.upright": (..., "images are always upright"),
  "task.mix_per": ("batch", "it is always 'batch'"),
}
"""Patterns of the paths of removed fields, the value that saved runs must have (`...`: any, without
effect on results), and what replaces the field; systems have more."""

_FRACTIONS = ("eval_every", "every", "warmup_steps", "cooldown_steps", "timescale")
"""Counts of steps, in any section, that may be fractions of all steps."""

_MINIMA = {
  **dict.fromkeys(("log_every", "eval_every", "checkpoint.every", "data.loader.num_workers"), 0),
  **dict.fromkeys(("batch_size", "eval_batch_size", "accumulation_steps", "num_steps"), 1),
  "checkpoint.keep": 1,
}


def config_folder() -> pathlib.Path:
  """Returns the folder of the shipped configs: in the wheel, or of the checkout."""
  package = pathlib.Path(__file__).resolve().parent
  shipped = package / "shipped" / "configs"
  return shipped if shipped.is_dir() else package.parent / "configs"


def _find_config(name: str) -> pathlib.Path:
  """Returns a file of the user, or else the shipped config of this name."""
  path, local, shipped = pathlib.Path(name).expanduser(), pathlib.Path("configs"), config_folder()
  file = pathlib.Path(f"{name.removesuffix('.py')}.py").expanduser()
  choices = [path, file]
  if file.parent in (pathlib.Path(), local):
    choices += [local / file.name, shipped / file.name]
  if found := next((choice for choice in choices if choice.is_file()), None):
    return found
  known = [str(p) for folder in (path.parent, local) for p in folder.glob("[!_]*.py")]
  known += [f"configs/{p.name}" for p in shipped.glob("[!_]*.py")]
  files = {key: file for file in known for key in (file, pathlib.Path(file).stem)}
  nearest = difflib.get_close_matches(str(path), files, n=1)
  hint = f"; did you mean {files[nearest[0]]}?" if nearest else ""
  raise FileNotFoundError(f"--config={name}: no such file{hint}")


def load(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Returns the complete config of `<file or name>[:variant][,field=value...]`, overridden.

  A file of the user takes precedence: `vit` is `vit.py`, `configs/vit.py` or the shipped one.
  """
  name, _, choice = argument.partition(":")
  module = _import_config(name, _find_config(name))
  with _errors_of(name):
    config = module.get_config(choice) if choice else module.get_config()
    if not isinstance(config, ConfigDict):
      raise ValueError(f"get_config returned a {type(config).__name__}; expected a ConfigDict")
  return apply_overrides(complete(config), overrides)


def list_configs() -> list[str]:
  """Returns the shipped configs with their variants, as `--config` takes them: "vit:demo"."""
  files = [file for file in sorted(config_folder().glob("[!_]*.py")) if file.stem != "common"]
  return [f"{f.stem}:{name}" for f in files for name in _import_config(f.stem, f).VARIANTS]


def _import_config(name: str, path: pathlib.Path) -> Any:
  for folder in (config_folder(), path.resolve().parent):  # for `from configs import common`
    if str(folder.parent) not in sys.path:
      sys.path.insert(0, str(folder.parent))
  spec = importlib.util.spec_from_file_location("vit_jax_zoo_config", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={name}: not a Python file; expected configs/<system>.py")
  module = importlib.util.module_from_spec(spec)
  with _errors_of(name):
    spec.loader.exec_module(module)
  if not callable(getattr(module, "get_config", None)):
    raise ValueError(f"--config={name}: defines no get_config(arg); see configs/vit.py")
  return module


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
  try:
    yield
  except OSError:  # names its file
    raise
  except Exception as error:  # of any class: it is the user's code
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    raise ValueError(f"--config={name}: {kind}{error}") from error


def complete(config: ConfigDict) -> ConfigDict:
  """Returns a copy of the config with every default filled in."""
  whole = defaults()
  with whole.ignore_type():
    _fill(whole, config, "")
  return whole


def _fill(whole: ConfigDict, given: ConfigDict, path: str) -> None:
  for key in given:
    name = f"{path}{key}"
    if key not in whole:
      _check_not_renamed(name, f"config.{name}")
    if key not in whole and path.rstrip(".") not in OPEN_SECTIONS:
      raise ValueError(unknown_name(f"field of config.{path}".rstrip("."), str(key), whole))
    if isinstance(whole.get(key), ConfigDict) and isinstance(given[key], ConfigDict):
      _fill(whole[key], given[key], f"{name}.")
    elif given[key] is None and key not in whole and given.get_type(key) is not type(None):
      whole[key] = given.get_ref(key)  # a typed placeholder, which a flag may set
    else:
      whole[key] = given[key]


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  """Sets fields of a complete config, in place, by `ml_collections.config_flags`; returns it.

  Overrides are `--config.section.field=value`: None, a value of the field's type, or, for lists and
  new fields (in `OPEN_SECTIONS`), a Python literal or a string. A new optimizer name drops the
  fields of the old one.
  """
  optimizers = _optimizer_names(config)
  given = set()
  for flag in overrides:
    name, equals, text = flag.lstrip("-").partition("=")
    if not (flag.startswith("-") and name.startswith("config.")):
      raise ValueError(f"unexpected argument {flag!r}; options begin with --")
    if not equals:
      raise ValueError(f"{flag}: no value; write {flag}=value")
    path = name.removeprefix("config.")
    _prepare(config, path, text)
    given.add(path)
  values, argv = flags.FlagValues(), ["", *(f"--{flag.lstrip('-')}" for flag in overrides)]
  options = {"lock_config": False, "accept_new_attributes": True, "sys_argv": argv}
  with config.unlocked():
    try:
      config_flags.DEFINE_config_dict("config", config, flag_values=values, **options)
      values(argv)
    except (flags.Error, TypeError) as error:
      raise ValueError(str(error)) from None
    for path, name in _optimizer_names(config).items():
      section = functools.reduce(operator.getitem, path.split("."), config)
      fields = optimizer_fields(name)
      dropped = [key for key in section if key not in fields and f"{path}.{key}" not in given]
      if dropped and optimizers.get(path) != name:
        for key in dropped:
          del section[key]
        logging.info("config.%s: %s has no %s; dropped", path, name, ", ".join(dropped))
  return config


def _prepare(config: ConfigDict, path: str, text: str) -> None:
  """Checks a field's name; replaces it by a placeholder if the flag may change its type."""
  *parents, key = path.split(".")
  section, above = config, ""
  for parent in parents:
    if not isinstance(section.get(parent), ConfigDict):
      known = [name for name in section if isinstance(section[name], ConfigDict)]
      wrong = f"--config.{path}: {parent} is no section; set all of it, --config.{above}{parent}="
      unknown = unknown_name(f"section of config.{above}".rstrip("."), parent, known)
      raise ValueError(wrong if parent in section else unknown)
    section, above = section[parent], f"{above}{parent}."
  if isinstance(section.get(key), ConfigDict):
    fields = ", ".join(f"--config.{path}.{name}" for name in section[key])
    raise ValueError(f"--config.{path}: a section; set its fields: {fields}")
  if key not in section:
    _check_not_renamed(path, f"--config.{path}")
    _check_not_of_groups(config, path)
    if not above.rstrip(".").startswith(OPEN_SECTIONS):
      raise ValueError(unknown_name(f"field of config.{above}".rstrip("."), key, section))
    return
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(section[key], list) and not isinstance(value, list | tuple):
    raise ValueError(f"--config.{path}={text}: expected a list")
  is_fraction = key in _FRACTIONS and isinstance(value, int | float)
  if value is None or isinstance(section[key], list) or is_fraction:
    with config.unlocked():
      del section[key]
      section[key] = placeholder(object)
  else:
    _check_type(section.get_type(key), path, text)


_PARSERS = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}


def _check_type(kind: type, path: str, text: str) -> None:
  parser = _PARSERS.get(kind, flags.ArgumentParser())
  try:
    parser.parse(text)
  except ValueError:
    expected = parser.syntactic_help or "true or false"
    raise ValueError(f"--config.{path}={text}: expected {expected}") from None


def _new_name(path: str) -> str | None:
  of_systems = (pair for system in systems().values() for pair in system.renamed_fields)
  return next((new for old, new in (*RENAMED, *of_systems) if fnmatch.fnmatch(path, old)), None)


def _removed(path: str) -> tuple[Any, str] | None:
  of_systems = {k: v for system in systems().values() for k, v in system.removed_fields.items()}
  every = REMOVED | {k: (v, f"it is always {v!r}") for k, v in of_systems.items()}
  return next((every[pattern] for pattern in every if fnmatch.fnmatch(path, pattern)), None)


def _check_not_renamed(path: str, shown: str) -> None:
  if new := _new_name(path):
    raise ValueError(f"{shown} is now {shown.rpartition('.')[0]}.{new}")
  if removed := _removed(path):
    raise ValueError(f"{shown}: the field was removed; {removed[1]}")


def _check_not_of_groups(config: ConfigDict, path: str) -> None:
  section, _, key = path.rpartition(".")
  if section == "optimizer" and "name" not in config.optimizer:
    fields = " or ".join(f"--config.{group}.{key}" for group in _optimizer_names(config))
    raise ValueError(f"--config.{path}: this task has several optimizers; set {fields}")


def rename_fields(config: dict[str, Any], path: str = "") -> dict[str, Any]:
  """Returns the config of a saved run, as nested dicts, with the current field names."""
  current = {}
  for key, value in config.items():
    name = f"{path}{key}"
    if removed := _removed(name):
      if removed[0] not in (..., value):
        raise ValueError(f"config.{name}: the field was removed; {value!r} is not supported")
      continue
    new = _new_name(name) or key
    items = value if isinstance(value, list) else [value]
    items = [rename_fields(x, f"{name}.") if isinstance(x, dict) else x for x in items]
    current[new] = items if isinstance(value, list) else items[0]
  return current


def _optimizer_names(config: ConfigDict) -> dict[str, str]:
  """Returns the optimizer's name by the path of its section; several for optimizer groups."""
  if "name" in config.optimizer:
    return {"optimizer": config.optimizer.name}
  sections = {f"optimizer.{group}": section for group, section in config.optimizer.items()}
  return {k: s.name for k, s in sections.items() if isinstance(s, ConfigDict) and "name" in s}


def check_values(config: ConfigDict) -> None:
  """Raises ValueError if a field of a complete config is not set, or out of its range."""
  if missing := sorted(set(defaults()) - set(config)):
    raise ValueError(f"config.{missing[0]}: missing; call config.complete first")
  for key in ("batch_size", "model", "task", "optimizer"):
    if config[key] is None or (key != "batch_size" and not config[key]):
      raise ValueError(f"config.{key}: not set; expected a value")
  check_names("field of config.data.loader", config.data.loader, LOADER_FIELDS)
  if config.num_steps is None and config.num_epochs is None:
    raise ValueError("config.num_steps: not set; expected num_steps or num_epochs")
  _check_minima(config)
  check_loggers(config.logging)
  seed = config.seed
  if isinstance(seed, bool) or not (isinstance(seed, int) and 0 <= seed < 1 << 63):
    raise ValueError(f"config.seed: {seed}; expected an integer, at least 0 and below 2**63")
  if config.num_epochs is not None and not config.num_epochs > 0:
    raise ValueError(f"config.num_epochs: {config.num_epochs}; expected a number above 0")
  if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
    raise ValueError(f"config.ema_decay: {config.ema_decay}; expected a number in [0, 1), or None")
  check_names("checkpoint.best_mode", [config.checkpoint.best_mode], ("max", "min"))


def _check_minima(config: ConfigDict) -> None:
  for name, minimum in _MINIMA.items():
    value = functools.reduce(operator.getitem, name.split("."), config)
    may_be_fraction = name.rpartition(".")[2] in _FRACTIONS
    is_valid = isinstance(value, int) and value >= minimum
    if may_be_fraction and isinstance(value, float):
      is_valid = 0 < value < 1 or (value.is_integer() and value >= minimum)
    if value is not None and not is_valid:
      fraction = ", or a fraction of the run, such as 0.05" if may_be_fraction else ""
      raise ValueError(f"config.{name}: {value}; expected an integer, at least {minimum}{fraction}")
