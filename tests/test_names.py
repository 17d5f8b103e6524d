"""Misspelt names: the message has the nearest that is known, in one line."""

import dataclasses

import pytest
from flax import linen as nn

from vit_jax_zoo.errors import check_names, field_names, part_fields


class Part(nn.Module):
  """An inner part of a model, for these tests alone."""

  width: int = 8
  depth: int = 2


@dataclasses.dataclass(frozen=True)
class Limits:
  """A part that is no module."""

  before_nms: int = 1


def test_the_first_unknown_name_is_reported():
  check_names("field", ["width"], iter(["depth", "width"]))
  with pytest.raises(ValueError, match=r"^unknown field 'dpeth'; did you mean 'depth'\? Known:"):
    check_names("field", ["width", "dpeth", "zzz"], iter(["depth", "width"]))


def test_linens_own_fields_are_none_of_a_config():
  assert field_names(Part) == field_names(Part()) == ["width", "depth"]
  assert field_names(Limits) == ["before_nms"]


def test_fields_of_a_part():
  assert part_fields("head", Part, None) == {}
  assert part_fields("head", Part, {"width": 4}) == {"width": 4}
  for kind, wrong, right in ((Part, "widht", "width"), (Limits, "beforenms", "before_nms")):
    with pytest.raises(ValueError, match=f"of head '{wrong}'; did you mean '{right}'") as error:
      part_fields("head", kind, {wrong: 1})
    assert "\n" not in str(error.value)
