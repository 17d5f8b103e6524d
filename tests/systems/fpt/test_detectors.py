"""R-CNNs with a feature pyramid transformer as neck."""

import jax
import numpy as np
import pytest

from tests.systems.rcnn.test_model import check_outputs, check_proposals, tiny
from tests.systems.rcnn.test_predictor import SMALL
from tests.variables import random_variables
from vit_jax_zoo.inference.base import Options, Trained, create_predictor
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.tasks import create_task


@pytest.mark.long
def test_proposals_lie_in_image_and_ignore_padding():
  check_proposals(tiny(neck="fpt"))


@pytest.mark.slow
def test_official_detector_outputs_have_expected_shapes_and_are_finite():
  model = tiny(
    neck="fpt",
    neck_fields={"variant": "official", "norm": "group_norm"},
    adaptive=True,
    convention="detectron",
    box_head={"num_convs": 2, "num_dense": 1, "width": 16, "norm": "group_norm"},
    mask_head={"norm": "group_norm", "fused": True, "num_convs": 3, "width": 64},
    dtype="bfloat16",
  )
  check_outputs(model)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_explain_draws_attention_of_levels(variant):
  """The maps are rows of the levels' attention, for the query at the image's centre."""
  fields = {"levels": ("c2", "c3"), "anchor_sizes": (16, 16), "mask_head": None, "width": 32}
  neck = {"variant": variant}
  model = RCNN(**{**SMALL, **fields, "neck": "fpt", "neck_fields": neck})
  task = create_task("instance_detection", model, num_classes=2)
  image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
  variables = random_variables(task.init, {"image": image[None]})
  trained = Trained("test", task, variables, lambda image: {"image": image}, None, "faster_rcnn")
  prediction = create_predictor(trained, Options(threshold=1.0, explain=True))(image)
  assert prediction.record["objects"] == []
  figure = prediction.pictures["levels"]
  batch = {"image": image[None], "query_position": np.full((1, 2), 0.5, np.float32)}
  explanation = jax.device_get(jax.jit(task.explain)(variables, batch))
  maps = [x[0] for x in explanation["levels"].values()]
  pooled = variant == "official"
  sizes = [(3, 4), (2, 2)] if pooled else [(6, 8), (3, 4), (3, 4)]
  assert [x.shape for x in maps] == sizes
  for attention in maps:
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    assert attention.min() >= 0
  titles = [ax.get_title() for ax in figure.axes]
  assert titles[:3] == ["query: ring", "p2: 6x8", "p3: 3x4"]
