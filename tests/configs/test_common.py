"""The text after `--config=configs/x.py:`: its syntax and errors."""

import pytest
from ml_collections import ConfigDict

from configs import common
from vit_jax_zoo.config import complete

DATA = {"train": {}, "eval": {}}


def demo(*, num_steps: int = 10, rate: float = 0.1, flip: bool = False, name: str = "a"):
  model = {"rate": rate, "flip": flip, "name": name}
  return ConfigDict({"num_steps": num_steps, "model": model, "data": DATA})


def other(*, image_size: int = 224):
  return ConfigDict({"model": {"image_size": image_size}, "data": DATA})


def picked(config):
  return config.num_steps, config.model.rate, config.model.flip, config.model.name


VARIANTS = {"demo": demo, "b16_other": other}


def test_empty_text_first_variant():
  assert common.build("", VARIANTS) == common.build(None, VARIANTS)
  assert picked(common.build("", VARIANTS)) == picked(demo())


@pytest.mark.parametrize("arg", ["demo,num_steps=20,rate=1,flip=true,name=gs://a/b=c", None])
def test_fields_converted_to_default_type(arg):
  arg = arg or "num_steps=20, rate=1e0, flip=True, name=gs://a/b=c"
  config = common.build(arg, VARIANTS)
  assert picked(config) == (20, 1.0, True, "gs://a/b=c")
  assert isinstance(config.model.rate, float)


def test_value_with_commas():
  arg = "demo,source=folder:/a, b,c.d,num_steps=3"
  fields = {"source": "folder:/a, b,c.d", "num_steps": "3"}
  assert common.parse_arg(arg, VARIANTS) == ("demo", fields)


def test_other_variant():
  assert common.build("b16_other,image_size=384", VARIANTS).model.image_size == 384


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("dmo", "variant 'dmo'.*'demo'.*b16_other, demo"),
    ("demo,num_step=3", "field of demo 'num_step'.*'num_steps'"),
    ("b16_other,flip=true", "field of b16_other 'flip'.*image_size"),
    ("demo,flip=yes", "demo,flip='yes': "),
    ("demo,flip=1", "demo,flip='1': "),
    ("demo,num_steps=1.5", "demo,num_steps='1.5': .* 10"),
    ("demo,rate=fast", "demo,rate='fast': .* 0.1"),
    ("demo,flip", "'demo,flip': 'flip'"),
    ("demo,rate=1,rate=2", "rate: set twice in"),
  ],
)
def test_invalid_text_raises(arg, message):
  with pytest.raises(ValueError, match=message) as error:
    common.build(arg, VARIANTS)
  assert "\n" not in str(error.value)


def base(size: str, *, num_epochs: int = 7, image_size: int = 224):
  """Base recipe."""
  optimizer = {
    "name": "adamw",
    "learning_rate": 8e-4,
    "schedule": {"name": "linear", "end_value": 0.0},
  }
  model = {"name": size, "image_size": image_size}
  return ConfigDict({"num_epochs": num_epochs, "model": model, "optimizer": optimizer})


def test_variant_of_changes_arguments_and_fields():
  schedule = {"name": "cosine"}
  changes = {"optimizer": {"learning_rate": 4e-4, "schedule": schedule}, "sharding": {"mesh": {}}}
  variants = {"l16": common.variant_of(base, size="l16", num_epochs=14, **changes)}
  assert common.build("", variants).to_dict() == {
    "num_epochs": 14,
    "model": {"name": "l16", "image_size": 224},
    "optimizer": {
      "name": "adamw",
      "learning_rate": 4e-4,
      "schedule": {"name": "cosine", "end_value": 0.0},
    },
    "sharding": {"mesh": {}},
    "recipe": {"batch_size": None, "learning_rates": {"optimizer": 4e-4}},
  }
  assert variants["l16"].__doc__ == "Base recipe."
  changed = common.build("l16,num_epochs=30,image_size=384", variants)
  assert (changed.num_epochs, changed.model.image_size) == (30, 384)
  with pytest.raises(ValueError, match="field of l16 'size'"):
    common.build("l16,size=b16", variants)
  assert base("b16").optimizer.learning_rate == 8e-4


def test_variant_of_a_variant():
  middle = common.variant_of(base, size="b16", num_epochs=14)
  last = common.variant_of(middle, image_size=384)
  assert last().model.to_dict() == {"name": "b16", "image_size": 384}
  assert last(num_epochs=1).num_epochs == 1
  assert last().num_epochs == 14


def test_unset_fields_settable_by_type():
  config = complete(common.build("demo", VARIANTS)).lock()
  assert config.init_from is None
  config.init_from, config.ema_decay, config.sharding.mesh.fsdp = "runs/a", 0.999, 4
  with pytest.raises(TypeError):
    config.init_from = 3
  with pytest.raises(AttributeError, match="ema_decay"):
    config.ema_deca = 0.9
  assert config.sharding.mesh.to_dict() == {"data": -1, "fsdp": 4, "model": 1}


def test_recipe_values_kept():
  def recipe():
    sharding = {"mesh": {"data": 1, "fsdp": -1}}
    data = {"train": {}, "eval": {}, "loader": {"num_workers": 8}}
    return ConfigDict({"num_epochs": 3, "sharding": sharding, "data": data})

  config = complete(common.build("", {"recipe": recipe}))
  assert (config.num_epochs, config.num_steps) == (3, None)
  assert config.sharding.mesh.to_dict() == {"data": 1, "fsdp": -1, "model": 1}
  assert config.data.loader.to_dict() == {"num_workers": 8, "on_corrupt": "error"}
