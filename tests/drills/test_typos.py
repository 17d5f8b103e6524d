"""Drill: 200 misspelt fields of the six demos; each error suggests the right name."""

import copy
import random
import string

import jax
import pytest
from ml_collections import ConfigDict

from vit_jax_zoo import config as config_lib
from vit_jax_zoo import trainer
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.registry import create_model, systems
from vit_jax_zoo.tasks import create_task

pytestmark = pytest.mark.slow

NAMES = ("vit", "igpt", "lambda_resnet", "detr", "ttsr", "fpt")
SYSTEMS = [name for name in NAMES if name in systems()]
COUNT = 200
SHORTEST = 4  # shorter names are too close to others
FROM_DATA = {"num_classes": 10, "class_names": ()}


def demo(system):
  config = config_lib.load(f"configs/{system}.py:demo")
  config.update(batch_size=8, eval_batch_size=8, accumulation_steps=1)  # for eight devices
  return config


def fields_of(section, path=()):
  for key, value in section.items():
    yield (*path, key)
    if isinstance(value, ConfigDict):
      yield from fields_of(value, (*path, key))


def misspell(word, rng):
  """Returns the word with two letters swapped, one dropped, one doubled or one replaced."""
  at = rng.randrange(1, len(word) - 1)
  other = rng.choice(string.ascii_lowercase)
  return rng.choice(
    (
      word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :],
      word[:at] + word[at + 1 :],
      word[:at] + word[at] + word[at:],
      word[:at] + other + word[at + 1 :],
    )
  )


def misspellings():
  rng = random.Random(0)
  # Sections with user-chosen keys, or with keys of any name, have no correct suggestion.
  free = {("data", "eval"), ("recipe", "learning_rates"), ("sharding", "rules")}
  places = [
    (system, path)
    for system in SYSTEMS
    for path in fields_of(demo(system))
    if len(path[-1]) >= SHORTEST and path[:-1] not in free
  ]
  found, known = [], {path[-1] for _, path in places}
  while len(found) < COUNT:
    system, path = rng.choice(places)
    wrong = misspell(path[-1], rng)
    if wrong not in known:
      found.append((system, path, wrong))
  return found


def build_parts(config):
  """Passes each section to the part that it configures, like a run, without compiling."""
  config = config_lib.complete(config)
  made = trainer.build(config)
  made.train_batches()
  with jax.set_mesh(made.mesh):
    made.program(next(made.train_batches()))  # inner modules are created when the model is traced
  for name in config.data.eval:
    made.eval_batches(name)


@pytest.mark.parametrize(
  ("system", "path", "wrong"),
  misspellings(),
  ids=lambda value: ".".join(value) if isinstance(value, tuple) else value,
)
def test_misspelt_field_suggests_name(system, path, wrong):
  config = demo(system)
  place = config
  for key in path[:-1]:
    place = place[key]
  with config.unlocked(), config.ignore_type():
    place[wrong] = copy.deepcopy(place[path[-1]])  # as --config.<path>.<wrong>=... does
  with pytest.raises(ValueError, match=f"'{wrong}'.*'{path[-1]}'") as error:
    build_parts(config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("system", SYSTEMS)
def test_misspelt_name_of_part_suggests_name(system):
  config, rng = demo(system), random.Random(system)
  part = {
    section: {k: FROM_DATA.get(k) if v is None else v for k, v in config[section].to_dict().items()}
    for section in ("model", "task")
  }
  model = create_model(**part["model"])
  steps = [s.to_dict() if isinstance(s, ConfigDict) else s for s in config.data.train.transforms]
  tries = [
    (part["model"], lambda fields: create_model(**fields)),
    (part["task"], lambda fields: create_task(model=model, **fields)),
    *((dict(step), lambda fields: build_transforms([fields])) for step in steps),
  ]
  for fields, make in tries:
    wrong = misspell(fields["name"], rng)
    if wrong == fields["name"]:
      continue
    with pytest.raises(ValueError, match=f"'{wrong}'.*'{fields['name']}'") as error:
      make({**fields, "name": wrong})
    assert "\n" not in str(error.value)
