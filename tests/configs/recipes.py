"""All recipes of configs/: names, resolved configs, and their differences as text for review."""

import copy
import functools
import importlib
import json
import pathlib

from vit_jax_zoo.config import defaults, load

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
SYSTEMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
CASES = [
  (system, variant)
  for system in SYSTEMS
  for variant in importlib.import_module(f"configs.{system}").VARIANTS
]

ABSENT, EMPTY = "(absent)", "()"


def resolve(system, variant=""):
  return copy.deepcopy(_load(system, variant))


@functools.cache
def _load(system, variant):
  return load(str(FOLDER / f"{system}.py") + f":{variant}")


def differences(configs):
  """Returns recipes as text with one line per section of changed fields; no field is lost.

  Each recipe is written as its differences from `config.defaults()`, which come first, or from an
  earlier recipe, whichever has fewer.

  Args:
    configs: resolved configs of one system, as nested dicts by variant.
  """
  known = {path: text for path, text in fields(defaults().to_dict()).items() if text != EMPTY}
  lines = ["defaults", *_section_lines(known), ""]
  written = {"defaults": known}
  for variant, config in configs.items():
    own = fields(config)
    changed = {base: _changed(own, known) for base, known in written.items()}
    base = min(changed, key=lambda name: len(changed[name]))
    lines += [f"{variant} = {base}", *_section_lines(changed[base]), ""]
    written[variant] = own
  return "\n".join(lines)


def fields(tree, path=()):
  """Returns the values of a nested dict by path; a list or an empty dict is one value."""
  if not isinstance(tree, dict) or not tree:
    return {path: _text(tree)}
  return {k: v for name, below in tree.items() for k, v in fields(below, (*path, name)).items()}


def _changed(own, base):
  missing = dict.fromkeys(base.keys() - own.keys(), ABSENT)
  return missing | {path: text for path, text in own.items() if base.get(path) != text}


def _section_lines(changed):
  sections = {}
  for path, text in sorted(changed.items(), key=lambda item: (item[0][:-1], item[0])):
    sections.setdefault(".".join(path[:-1]) or "config", []).append(f"{path[-1]}={text}")
  return [f"  {name}: {', '.join(values)}" for name, values in sections.items()]


def _text(value):
  """Returns a value as JSON, and a dict with a name as `name(field=value)`."""
  if isinstance(value, list | tuple):
    return f"[{', '.join(map(_text, value))}]"
  if isinstance(value, dict):
    items = [f"{k}={_text(v)}" for k, v in sorted(value.items()) if k != "name"]
    return f"{value.get('name', '')}({', '.join(items)})"
  return json.dumps(value, ensure_ascii=False)
