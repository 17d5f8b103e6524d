"""Misspelt names: one-line errors that suggest the closest name."""

import dataclasses

import pytest
from flax import linen as nn

from vit_jax_zoo.errors import check_names, field_names, part_fields


class Part(nn.Module):
  """A module for these tests."""

  width: int = 8
  depth: int = 2


@dataclasses.dataclass(frozen=True)
class Limits:
  """A dataclass that is not a module."""

  before_nms: int = 1


def test_first_unknown_name_reported():
  check_names("field", ["width"], iter(["depth", "width"]))
  with pytest.raises(ValueError, match=r"^unknown field 'dpeth'; .*'depth'"):
    check_names("field", ["width", "dpeth", "zzz"], iter(["depth", "width"]))


def test_field_names_exclude_linen_fields():
  assert field_names(Part) == field_names(Part()) == ["width", "depth"]
  assert field_names(Limits) == ["before_nms"]


def test_part_fields_checked():
  assert part_fields("head", Part, None) == {}
  assert part_fields("head", Part, {"width": 4}) == {"width": 4}
  for kind, wrong, right in ((Part, "widht", "width"), (Limits, "beforenms", "before_nms")):
    with pytest.raises(ValueError, match=f"of head '{wrong}'.*'{right}'") as error:
      part_fields("head", kind, {wrong: 1})
    assert "\n" not in str(error.value)
