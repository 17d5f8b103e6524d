import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import GOLDENS
from vit_jax_zoo import create_model, list_models, registry

IMAGE_SIZES = {"igpt": 32}
OWN_COUNTS = ("lambda_resnet", "ttsr", "faster_rcnn", "mask_rcnn", "fpt_pyramid")


def counted_models():
  """Returns the models whose counts are not in a golden file of their own."""
  return [name for name in list_models() if not name.startswith(OWN_COUNTS)]


def parameter_count(name):
  size = IMAGE_SIZES.get(name.split("_")[0], 224)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), images)
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


@pytest.mark.long
def test_parameter_counts(golden_json):
  golden_json("param_counts", {name: parameter_count(name) for name in counted_models()})


def test_parameter_counts_of_smallest_models():
  """One model of each family; `test_parameter_counts` has all."""
  counts = json.loads((GOLDENS / "param_counts.json").read_text())
  for family in registry.model_classes():
    own = [name for name in registry.variants(family) if name in counts]
    for name in sorted(own, key=counts.get)[:1]:
      assert parameter_count(name) == counts[name], name


def test_names_begin_with_their_family():
  for family in registry.model_classes():
    assert registry.variants(family)
    assert all(
      name.startswith(f"{family}_") or name.startswith(family) for name in registry.variants(family)
    )
  names = list_models()
  assert (
    len(names)
    == len(set(names))
    == sum(len(registry.variants(f)) for f in registry.model_classes())
  )


def test_list_models_pattern():
  first, *others = list_models()
  assert list_models(f"{first[:-1]}[{first[-1]}]") == [first]
  assert list_models(f"[!{first[0]}]*") == [name for name in others if name[0] != first[0]]
  assert list_models("nothing*") == []


OTHER_NAMES = {
  "vit": {
    "vit_base_patch16_224": "vit_b16",
    "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k": "vit_ti16",
    "google/vit-large-patch32-224-in21k": "vit_l32",
    "ViT-H/14": "vit_h14",
    "vit_b_16": "vit_b16",
    "vit_large_patch14_clip_224": "vit_large_patch14_clip_224",
    "deit_base_patch16_224": "vit_b16",
    "deit_base_distilled_patch16_224": "deit_base_distilled_patch16_224",
  },
  "detr": {
    "facebook/detr-resnet-101-dc5": "detr_r101_dc5",
    "detr_resnet50_panoptic": "detr_r50_panoptic",
  },
  "igpt": {"openai/imagegpt-small": "igpt_s"},
  "rcnn": {"maskrcnn_resnet50_fpn": "mask_rcnn_r50_fpn"},
  "lambda_resnet": {"timm/lambda_resnet26rpt_256.c1_in1k": "lambda_resnet26rpt_256"},
}


@pytest.mark.parametrize(
  ("name", "expected"),
  [pair for system in registry.systems() for pair in OTHER_NAMES.get(system, {}).items()],
)
def test_names_of_other_libraries(name, expected):
  assert registry.model_name(name) == expected
  if expected in list_models():
    assert create_model(name) == create_model(expected)


@pytest.mark.parametrize("family", sorted(registry.model_classes()))
def test_value_of_wrong_type_raises(family):
  name = next(iter(registry.variants(family)))
  wrong = {int: [(4, 4), 1.5, "4", True, None], float: [(0.1,), "0.1", True], bool: [1, "yes"]}
  tried = 0
  for field in dataclasses.fields(registry.model_classes()[family]):
    for value in wrong.get(field.type, ()):
      with pytest.raises(ValueError, match=re.escape(f"{name}: {field.name} is {value!r}; ")):
        create_model(name, **{field.name: value})
      tried += 1
  assert tried


def test_sharding_rules_end_with_catch_all():
  for family in registry.model_classes():
    rules = registry.sharding_rules(next(iter(registry.variants(family))))
    assert rules[-1][0] == ".*"


def test_unknown_names_raise():
  name = list_models()[0]
  with pytest.raises(ValueError, match=f"'x{name}'.*'{name}'") as info:
    create_model(f"x{name}")
  assert "\n" not in str(info.value)
  with pytest.raises(ValueError, match=f"field of {name} 'dtipe'"):
    create_model(name, dtipe="bfloat16")
