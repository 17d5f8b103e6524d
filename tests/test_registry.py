import jax
import jax.numpy as jnp
import pytest

from vit_jax_zoo import create_model, list_models, registry

IMAGE_SIZES = {"igpt": 32}
OWN_COUNTS = ("lambda_resnet", "ttsr", "faster_rcnn", "mask_rcnn", "fpt_pyramid")


def counted_here():
  """Every model but the families whose counts stand in a golden file of their own."""
  return [name for name in list_models() if not name.startswith(OWN_COUNTS)]


def test_parameter_counts_of_every_name(golden_json):
  counts = {}
  for name in counted_here():
    size = IMAGE_SIZES.get(name.split("_")[0], 224)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), images)
    counts[name] = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  golden_json("param_counts", counts)


def test_names_begin_with_their_family_and_belong_to_one():
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


def test_list_models_takes_a_pattern():
  assert list_models("vit_r50_*") == ["vit_r50_b16", "vit_r50_b32", "vit_r50_l16", "vit_r50_l32"]
  assert list_models("nothing*") == []


def test_overrides_go_over_the_variant():
  model = create_model("vit_b16", num_classes=10, dtype="bfloat16", depth=2)
  assert (model.num_classes, model.dtype, model.depth, model.width) == (10, "bfloat16", 2, 768)


def test_every_family_has_sharding_rules_that_end_with_a_catch_all():
  for family in registry.model_classes():
    rules = registry.sharding_rules(next(iter(registry.variants(family))))
    assert rules[-1][0] == ".*"


def test_unknown_names_are_one_line():
  with pytest.raises(ValueError, match="unknown model 'vit_b17'; did you mean 'vit_b16'") as info:
    create_model("vit_b17")
  assert "\n" not in str(info.value)
  with pytest.raises(ValueError, match="unknown field of vit_b16 'widht'; did you mean 'width'"):
    create_model("vit_b16", widht=3)
