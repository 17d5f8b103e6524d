"""Loads configs, fills in defaults, applies command-line overrides, and checks field names."""

import ast
import difflib
import fnmatch
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from vit_jax_zoo.data.pipeline import LOADER_FIELDS
from vit_jax_zoo.errors import check_names, unknown_name
from vit_jax_zoo.training.optim import optimizer_fields


def defaults() -> ConfigDict:
  """Returns every field with its default.

  * `seed`: of all randomness.
  * `num_steps` or `num_epochs`: the length of the run; one must be set, and steps take precedence.
  * `batch_size`: global, of a training step; `eval_batch_size`: of an evaluation step, by default
    the same.
  * `accumulation_steps`: number of micro-batches of a batch (gradient accumulation).
  * `model`: `name`, and fields of the model; `task`: `name`, and fields of the task. A field that
    is None is filled in from the training data (`num_classes`, `class_names`).
  * `data.train`: `source`, `split`, `transforms`, and options of the kind of source; `aug_repeats`:
    repeated augmentation. `data.eval`: the same for each evaluation by name, and `metrics`, the
    scores to report (default: all). A feature probe has a `fit_split`, and `probe`: `name` (see
    `metrics.feature_probes`; "linear" by default) and its fields; its classes may differ from those
    of the training data. `extra_sources` in either: further sources of the same classes, each with
    `source`, `split` and options. `data.loader`: options of both batch makers of `data.pipeline`.
  * `optimizer`: see `training.optim`; a task with several optimizer groups has a section for each.
  * `ema_decay`: of the moving average of parameters and statistics; None: no average.
  * `sharding.mesh`: devices along `data`, `fsdp`, `model`; `sharding.rules`: precede those of the
    model.
  * `log_every`, `eval_every`, `checkpoint.every`: in steps; 0: at the end only. The last two may be
    fractions of the run: 0.05 is 20 times. The state is also saved before each evaluation.
  * `checkpoint.keep`: number of the newest checkpoints to keep; `checkpoint.best`: the score that
    selects the best one, "<evaluation>/<score>", by default of the first evaluation that is no
    probe, and the task's `best_metric`; `checkpoint.best_mode`: whether a higher ("max") or lower
    ("min") score is better; `checkpoint.eval_best_at_end`: evaluate the best at the end, as
    "best/...".
  * `explain`: with each evaluation, also draw attention maps and other intermediates.
  * `init_from`: a published checkpoint or a run to initialise the variables from.
  * `recipe`: `batch_size` and `learning_rates` of the unchanged recipe, for the advice of
    `training.lr_scaling`.
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
        "eval_best_at_end": False,
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

RENAMED = (
  ("checkpoint.score_best", "eval_best_at_end"),
  ("data.*mixed_with", "extra_sources"),
  ("data.train.repeats", "aug_repeats"),
  ("model.norm_after_pool", "fc_norm"),
  ("model.*flavor", "variant"),
  ("task.anchor_samples", "rpn_batch_size_per_image"),
  ("task.anchor_foreground", "rpn_positive_fraction"),
  ("task.anchor_high", "rpn_fg_iou_thresh"),
  ("task.anchor_low", "rpn_bg_iou_thresh"),
  ("task.anchor_beta", "rpn_smooth_l1_beta"),
  ("task.inside_only", "rpn_inside_only"),
  ("task.roi_samples", "box_batch_size_per_image"),
  ("task.roi_foreground", "box_positive_fraction"),
  ("task.roi_threshold", "box_fg_iou_thresh"),
  ("task.box_weights", "bbox_reg_weights"),
  ("task.box_beta", "box_smooth_l1_beta"),
  ("task.least_score", "box_score_thresh"),
  ("task.nms_threshold", "box_nms_thresh"),
  ("task.max_detections", "box_detections_per_img"),
  ("model.proposals.before_nms", "pre_nms_top_n"),
  ("model.proposals.after_nms", "post_nms_top_n"),
  ("model.proposals.nms_threshold", "nms_thresh"),
)
"""Patterns of the paths of renamed fields, and their new names. Saved runs are read with the new
names; config files and flags with an old one are refused with the new one."""

REMOVED = {
  "model.pre_norm": False,
  "model.proposals.least_side": 0.0,
  "model.residual_scale": 1.0,
  "task.transferal_kind": "l2",
  "task.transferal_by_trust": False,
  "task.adversarial_kind": "wasserstein",
}
"""Removed fields of saved runs, and the values that they have to have."""

_FRACTIONS = ("eval_every", "every", "warmup_steps", "cooldown_steps", "timescale")
"""Counts of steps, in any section, that may be fractions of all steps."""

_MINIMA = {
  "batch_size": 1,
  "eval_batch_size": 1,
  "num_steps": 1,
  "accumulation_steps": 1,
  "log_every": 0,
  "eval_every": 0,
  "checkpoint.every": 0,
  "checkpoint.keep": 1,
}


def load_with_overrides(argument: str, overrides: Sequence[str]) -> ConfigDict:
  """Returns the complete config of `--config=argument` with overrides.

  Args:
    argument: see `load`.
    overrides: see `apply_overrides`.
  """
  config = load(argument)
  apply_overrides(config, overrides)
  return config


def load(argument: str) -> ConfigDict:
  """Returns the complete config of `configs/<system>.py[:variant][,field=value...]`.

  Raises:
    FileNotFoundError: the file does not exist; the message suggests the closest match.
    ValueError: a variant, field or value is invalid.
  """
  name, _, choice = argument.partition(":")
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    folders = dict.fromkeys((path.parent, pathlib.Path("configs")))
    known = {str(p): str(p) for folder in folders for p in folder.glob("[!_]*.py")}
    known |= {pathlib.Path(p).stem: p for p in known}
    nearest = difflib.get_close_matches(str(path), known, n=1)
    hint = f"; did you mean {known[nearest[0]]}?" if nearest else ""
    if not (known or path.is_absolute()):
      hint = f" in {pathlib.Path.cwd()}; change to the folder that holds {path.parts[0]}"
    raise FileNotFoundError(f"there is no config file {name}{hint}")
  root = str(path.resolve().parent.parent)
  if root not in sys.path:  # for `from configs import common`
    sys.path.insert(0, root)
  spec = importlib.util.spec_from_file_location("vit_jax_zoo_config", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={name}: not a Python file; expected configs/<system>.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (SyntaxError, NameError) as error:
    raise ValueError(f"--config={name}: {type(error).__name__}: {error}") from error
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={name}: defines no get_config(arg); see configs/vit.py")
  return complete(module.get_config(choice) if choice else module.get_config())


def complete(config: ConfigDict) -> ConfigDict:
  """Returns the config with every default filled in; the config itself if it is complete.

  Raises:
    ValueError: a field is unknown.
  """
  whole = defaults()
  with whole.ignore_type():
    _fill(whole, config, "")
  is_complete = _count_sections(whole) == _count_sections(config)
  return config if is_complete else whole


def _fill(whole: ConfigDict, given: ConfigDict, path: str) -> None:
  for key in given:
    name = f"{path}{key}"
    if key not in whole:
      _check_not_renamed(name, f"config.{name}")
    if key not in whole and path.rstrip(".") not in OPEN_SECTIONS:
      raise ValueError(unknown_name(f"field of {_dotted(path)}", str(key), whole))
    if isinstance(whole.get(key), ConfigDict) and isinstance(given[key], ConfigDict):
      _fill(whole[key], given[key], f"{name}.")
    elif given[key] is None and key not in whole and given.get_type(key) is not type(None):
      whole[key] = given.get_ref(key)  # a typed placeholder, which a flag may set
    else:
      whole[key] = given[key]


def _count_sections(config: ConfigDict) -> int:
  """Returns the number of fields at all levels that have defaults."""
  return sum(
    1 + (_count_sections(config[key]) if isinstance(config[key], ConfigDict) else 0)
    for key in config
  )


def _dotted(path: str) -> str:
  return f"config.{path}".rstrip(".")


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
  """Sets fields of a complete config, in place, by `ml_collections.config_flags`.

  Fields of `OPEN_SECTIONS` may be new. A new optimizer name drops the fields of the old one.

  Args:
    config: complete.
    overrides: flags of the form `--config.section.field=value`. The value has the field's type, or
      is None; a value for a list or a new field is a Python literal (`3e-4`, `True`, `[1, 2]`) or a
      string.

  Raises:
    ValueError: a field is unknown, an argument is no such flag, or a value has another type.
  """
  optimizers = {path: section.name for path, section in _optimizers(config)}
  given = set()
  for flag in overrides:
    name, equals, text = flag.lstrip("-").partition("=")
    if not (flag.startswith("-") and name.startswith("config.")):
      raise ValueError(f"unexpected argument {flag!r}; options begin with --")
    if not equals:
      raise ValueError(f"{flag} has no value; write {flag}=value")
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
    for path, section in _optimizers(config):
      if optimizers.get(path) != section.name:
        _drop_fields_of_old_optimizer(path, section, given)


def _prepare(config: ConfigDict, path: str, text: str) -> None:
  """Checks the name of a field, and lets config_flags parse any literal where needed."""
  *parents, key = path.split(".")
  section, above = config, ""
  for parent in parents:
    if not isinstance(section.get(parent), ConfigDict):
      known = [name for name in section if isinstance(section[name], ConfigDict)]
      raise ValueError(unknown_name(f"section of {_dotted(above)}", parent, known))
    section, above = section[parent], f"{above}{parent}."
  if isinstance(section.get(key), ConfigDict):
    fields = ", ".join(f"--config.{path}.{name}" for name in section[key])
    raise ValueError(f"--config.{path} is a section; set its fields: {fields}")
  if key not in section:
    _check_not_renamed(path, f"--config.{path}")
    _check_not_of_groups(config, path)
    if not above.rstrip(".").startswith(OPEN_SECTIONS):
      raise ValueError(unknown_name(f"field of {_dotted(above)}", key, section))
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


def _check_not_renamed(path: str, shown: str) -> None:
  for pattern, new in RENAMED:
    if fnmatch.fnmatch(path, pattern):
      raise ValueError(f"{shown} is now {shown.rpartition('.')[0]}.{new}")


def _check_not_of_groups(config: ConfigDict, path: str) -> None:
  section, _, key = path.rpartition(".")
  if section == "optimizer" and "name" not in config.optimizer:
    fields = " or ".join(f"--config.{group}.{key}" for group, _ in _optimizers(config))
    raise ValueError(f"--config.{path}: this task has several optimizers; set {fields}")


def rename_fields(config: dict[str, Any], path: str = "") -> dict[str, Any]:
  """Returns the config of a saved run, as nested dicts, with today's field names.

  Raises:
    ValueError: a removed field has a value that is no longer supported.
  """
  found = {}
  for key, value in config.items():
    name = f"{path}{key}"
    if name in REMOVED:
      if value != REMOVED[name]:
        raise ValueError(f"config.{name}: {value!r} is no longer supported; this field was removed")
      continue
    new = next((new for pattern, new in RENAMED if fnmatch.fnmatch(name, pattern)), key)
    found[new] = rename_fields(value, f"{name}.") if isinstance(value, dict) else value
  return found


def _optimizers(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields the sections of optimizers with their paths: one, or one for each group."""
  if "name" in config.optimizer:
    yield "optimizer", config.optimizer
  else:
    for group, section in config.optimizer.items():
      if isinstance(section, ConfigDict) and "name" in section:
        yield f"optimizer.{group}", section


def _drop_fields_of_old_optimizer(path: str, section: ConfigDict, given: set[str]) -> None:
  known = optimizer_fields(section.name)
  dropped = [key for key in section if key not in known and f"{path}.{key}" not in given]
  for key in dropped:
    del section[key]
  if dropped:
    logging.info("config.%s: %s has no %s; dropped", path, section.name, ", ".join(dropped))


def check_values(config: ConfigDict) -> None:
  """Checks the values of a complete config that do not depend on its parts.

  Raises:
    ValueError: a field is not set, or out of its range.
  """
  for key in ("batch_size", "model", "task", "optimizer"):
    if config[key] is None or (key != "batch_size" and not config[key]):
      raise ValueError(f"the config does not set {key!r}")
  check_names("field of config.data.loader", config.data.loader, LOADER_FIELDS)
  if config.num_steps is None and config.num_epochs is None:
    raise ValueError("the config must set num_steps or num_epochs")
  for name, minimum in _MINIMA.items():
    _check_at_least(config, name, minimum)
  seed = config.seed
  if isinstance(seed, bool) or not (isinstance(seed, int) and 0 <= seed < 1 << 63):
    raise ValueError(f"seed is {seed}; expected an integer, at least 0 and below 2**63")
  if config.num_epochs is not None and not config.num_epochs > 0:
    raise ValueError(f"num_epochs is {config.num_epochs}; expected a number above 0")
  if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
    raise ValueError(f"ema_decay is {config.ema_decay}; expected a number in [0, 1), or None")
  if config.checkpoint.best_mode not in ("max", "min"):
    mode = config.checkpoint.best_mode
    raise ValueError(unknown_name("checkpoint.best_mode", mode, ("max", "min")))


def _check_at_least(config: ConfigDict, name: str, minimum: int) -> None:
  value = config
  for key in name.split("."):
    value = value[key]
  may_be_fraction = name.rpartition(".")[2] in _FRACTIONS
  if may_be_fraction and isinstance(value, float):
    if 0 < value < 1:
      return
    value = int(value) if value.is_integer() else value
  if value is not None and not (isinstance(value, int) and value >= minimum):
    fraction = ", or a fraction of the run, such as 0.05" if may_be_fraction else ""
    raise ValueError(f"{name} is {value}; expected an integer, at least {minimum}{fraction}")
