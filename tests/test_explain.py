"""Explanations of ViT and LambdaResNet: intermediates and their order."""

import jax
import numpy as np
import pytest

from tests.conftest import system_module

vit = system_module("vit", "model")
figures = system_module("vit", "figures")


SMALL = {"num_classes": 3, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 8}


def explain(model, images):
  """Returns random parameters, the intermediates and the explanation."""

  @jax.jit
  def run(variables, images):
    _, state = model.apply(variables, images, mutable=["intermediates"])
    sown = state["intermediates"]
    return sown, model.explain(variables, sown, images.shape[1:3])

  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  variables = jax.tree.map(lambda x: np.float32(rng.uniform(-0.5, 0.5, x.shape)), shapes)
  if "batch_stats" in variables:  # variances must be positive
    variables["batch_stats"] = jax.tree.map(np.ones_like, variables["batch_stats"])
  return variables["params"], *run(variables, images)


def images(height=8, width=12, count=2):
  return jax.random.normal(jax.random.key(1), (count, height, width, 3))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_attention_of_class_token(scan_layers):
  model = vit.VisionTransformer(**SMALL, scan_layers=scan_layers)
  params, sown, explanation = explain(model, images())
  encoder = sown["encoder"]
  blocks = [encoder[f"block_{i}"] for i in range(2)] if not scan_layers else [encoder["blocks"]]
  weights = np.concatenate(
    [np.asarray(b["attention"]["weights"][0]).reshape(-1, 2, 2, 7, 7) for b in blocks]
  )
  assert explanation["heads"].shape == (2, 2, 2, 2, 3)  # [b l heads gh gw]
  np.testing.assert_allclose(
    explanation["heads"][1, 0, 1].ravel(), weights[0, 1, 1, 0, 1:], rtol=1e-5, atol=1e-7
  )
  rollout = np.asarray(figures.attention_rollout(weights))[:, 0, 1:]
  np.testing.assert_allclose(explanation["rollout"].reshape(2, 6), rollout, rtol=1e-5, atol=1e-7)
  assert explanation["distances"].shape == (2, 2)
  table = params["position_embedding"]["table"][0]
  np.testing.assert_array_equal(explanation["positions"], table[1:])
  np.testing.assert_array_equal(explanation["filters"], params["embedding"]["kernel"])
  drawn_figures, of_model = model.draw_explanation(
    np.zeros((2, 8, 12, 3)), "ab", jax.device_get(explanation)
  )
  assert "the class token" in drawn_figures["attention"].texts[1].get_text()
  assert "Components" in of_model["filters"].texts[0].get_text()
  assert set(of_model) == {"filters", "positions"}


def test_mean_pooling_attention_averaged_over_patches():
  model = vit.VisionTransformer(**SMALL, pool="mean", position_embedding="sincos_2d")
  _, sown, explanation = explain(model, images())
  weights = np.asarray(sown["encoder"]["blocks"]["attention"]["weights"][0])
  np.testing.assert_allclose(
    explanation["heads"][1, 1, 0].ravel(), weights[1, 1, 0].mean(axis=0), rtol=1e-5, atol=1e-7
  )
  np.testing.assert_allclose(np.asarray(explanation["rollout"]).sum(axis=(1, 2)), 1, rtol=1e-5)
  np.testing.assert_allclose(explanation["positions"], vit.sincos_2d(2, 3, 16), atol=1e-6)


def test_no_position_embedding():
  _, _, explanation = explain(
    vit.VisionTransformer(**SMALL | {"depth": 1}, position_embedding="none"), images()
  )
  assert "positions" not in explanation


def test_row_and_column_positions():
  model = vit.VisionTransformer(**SMALL | {"depth": 1}, position_embedding="learned_2d")
  params, _, explanation = explain(model, images())
  rows, columns = (params["position_embedding"][name] for name in ("rows", "columns"))
  expected = np.concatenate([rows[1], columns[2]])  # of the last patch of 2 x 3
  np.testing.assert_allclose(explanation["positions"][5], expected, rtol=1e-6)


def test_lambda_resnet_lambda_norms_and_stem():
  lambda_resnet = system_module("lambda_resnet", "model")
  model = lambda_resnet.LambdaResNet(
    num_classes=3, stem="conv3", stem_width=8, blocks=(1, 1, 1, 1), widths=(4, 4, 4, 4),
    lambda_blocks=("all", "none", "none", "all"), lambda_layer={"dim_k": 4, "receptive_field": 3},
  )  # fmt: skip
  params, sown, explanation = explain(model, images(8, 8))
  assert set(explanation["lambdas"]) == {"c2_block0", "c5_block0"}
  lambdas = np.asarray(sown["c2_block0"]["lambda_layer"]["position_lambda"][0])
  np.testing.assert_allclose(
    explanation["lambdas"]["c2_block0"][1, 3, 5], np.linalg.norm(lambdas[1, 3, 5]), rtol=1e-5
  )
  np.testing.assert_array_equal(explanation["filters"], params["stem"]["conv1"]["conv"]["kernel"])
  assert set(explanation) == {"lambdas", "filters"}
  drawn_figures, of_model = model.draw_explanation(
    np.zeros((2, 8, 8, 3)), "ab", jax.device_get(explanation)
  )
  assert len(drawn_figures["lambdas"].axes) == 1 + 2 + 1  # and a colour bar
  assert "Filters" in of_model["filters"].texts[0].get_text()
