"""The text behind `--config=configs/x.py:`: what it may say, and one line for what it may not."""

import pytest
from ml_collections import ConfigDict

from configs import common


def demo(*, num_steps: int = 10, rate: float = 0.1, flip: bool = False, name: str = "a"):
  return ConfigDict({"num_steps": num_steps, "rate": rate, "flip": flip, "name": name})


def other(*, image_size: int = 224):
  return ConfigDict({"image_size": image_size})


VARIANTS = {"demo": demo, "b16_other": other}


def test_nothing_is_the_first_variant():
  assert common.build("", VARIANTS) == common.build(None, VARIANTS) == demo()


@pytest.mark.parametrize("arg", ["demo,num_steps=20,rate=1,flip=true,name=gs://a/b=c", None])
def test_fields_have_the_types_of_their_defaults(arg):
  arg = arg or "num_steps=20, rate=1e0, flip=true, name=gs://a/b=c"
  config = common.build(arg, VARIANTS)
  assert config == demo(num_steps=20, rate=1.0, flip=True, name="gs://a/b=c")
  assert isinstance(config.rate, float)


def test_a_variant_of_another_shape():
  assert common.build("b16_other,image_size=384", VARIANTS).image_size == 384


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("dmo", "unknown variant 'dmo'; did you mean 'demo'? Known: b16_other, demo"),
    ("demo,num_step=3", "unknown field of demo 'num_step'; did you mean 'num_steps'? Known: "),
    ("b16_other,flip=true", "unknown field of b16_other 'flip'; Known: image_size"),
    ("demo,flip=True", "demo,flip='True': expected true or false"),
    ("demo,flip=1", "demo,flip='1': expected true or false"),
    ("demo,num_steps=1.5", "demo,num_steps='1.5': expected a whole number, such as 10"),
    ("demo,rate=fast", "demo,rate='fast': expected a number, such as 0.1"),
    ("demo,flip", "cannot read 'flip' in 'demo,flip'; write variant,field=value,field=value"),
    ("demo,rate=1,rate=2", "the field 'rate' is set twice in 'demo,rate=1,rate=2'"),
  ],
)
def test_each_mistake_is_one_line(arg, message):
  with pytest.raises(ValueError) as error:  # noqa: PT011 the message is checked below
    common.build(arg, VARIANTS)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)
