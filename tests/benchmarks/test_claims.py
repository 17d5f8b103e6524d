"""`benchmarks/claims`: settings, left-out parts, resumption, page."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks.claims import common
from vit_jax_zoo.data.sources import demo, tfds

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("claim", common.CLAIMS)
class TestClaim:
  def test_cells_name_settings_and_texts(self, claim):
    module, texts = common.load_claim(claim), common.texts()[claim]
    for part in module.PARTS:
      assert {"title", "claimed", "differs"} == set(texts[part.key])
      assert set(part.plotted) <= set(part.columns)
      compared = {cell for pair in part.compared.values() for cell in pair}
      assert {setting for setting, _ in common.cells_of(part) | compared} <= set(module.SETTINGS)
    assert {part.key for part in module.PARTS} == {k for k, v in texts.items() if type(v) is dict}
    used = {setting for part in module.PARTS for setting, _ in common.cells_of(part)}
    assert used == set(module.SETTINGS)
    assert not any("," in name for name in module.SETTINGS)  # `--settings` is a list

  def test_settings_fit_configs(self, claim, tmp_path):
    """Each field is one of its config's, and `toy` shortens the run."""
    for setting in common.load_claim(claim).SETTINGS.values():
      plain = dataclasses.replace(setting, prepare=None)  # prepares data
      config = common.configure(plain, 1, tmp_path, toy=True)
      assert (config.seed, config.num_steps, config.batch_size) == (1, 2, 8)
      for path, value in setting.fields.items():
        if path in ("num_steps", "batch_size", "eval_batch_size", "eval_every", "data.eval"):
          continue
        found = config
        for name in path.split("."):
          found = found[name]
        assert (found.to_dict() if isinstance(value, dict) else found) == value
      if setting.init_from:
        assert config.init_from == str(tmp_path / f"{setting.init_from}_1")


def test_page_is_generated_from_results():
  assert (ROOT / "docs/evidence/claims.md").read_text() == common.page(ROOT)


def test_only_missing_runs_executed_and_saved(tmp_path, monkeypatch, capsys):
  made = []

  def run(function, claim, name, seed, folder, toy):
    assert (function, claim, toy) == (common.run, "ttsr", False)
    made.append((name, seed))
    if len(made) == 3:
      raise KeyboardInterrupt
    return {"test/psnr": 25.0 + seed - (name != "all parts"), "parameters": 7.0}

  monkeypatch.setattr(common.timing, "in_new_process", run)
  flags = ["--settings=all parts,without textures", f"--workdir={tmp_path}", f"--output={tmp_path}"]
  monkeypatch.setattr(sys, "argv", ["ttsr.py", *flags])
  with pytest.raises(KeyboardInterrupt):
    common.main("ttsr")
  file = tmp_path / "benchmarks/results/claims/ttsr.json"
  assert len(json.loads(file.read_text())["runs"]) == 2
  common.main("ttsr")
  names = ["all parts", "without textures"]
  expected = [(name, seed) for seed in common.SEEDS for name in names]
  assert made == [*expected[:2], expected[2], *expected[2:]]
  page = capsys.readouterr().out
  assert "| all parts" in page
  assert "26 (25 to 27)" in page
  assert "* All parts have a higher PSNR than without textures: in 3 of 3 seeds, by 1." in page
  assert "* All parts have a higher PSNR than without integration: not yet run." in page
  assert (tmp_path / "docs/evidence/claims_ttsr.png").stat().st_size > 5_000
  assert "**Seen here**: not yet run." in (tmp_path / "docs/evidence/claims.md").read_text()


def test_scenes_drawn_once_with_images_and_labels(tmp_path):
  prepare = common.labelled_shapes(5)
  location = prepare(tmp_path, False)["data.train.source"].removeprefix("tfds:")
  source = tfds.open_splits(location)["train"]()
  assert {"image", "label"} <= set(source[0])
  found = sorted(source[i]["label"] for i in range(5))
  assert found == sorted(scene["label"] for scene in demo.shapes("train", 5))
  (tmp_path / "shapes/1.0.0/mark").touch()
  prepare(tmp_path, False)
  assert (tmp_path / "shapes/1.0.0/mark").exists()


def test_suppressed_detections_removed():
  """Of two boxes of a class with an IoU above 0.7, the one of the lower score is removed."""
  detr = common.load_claim("detr")
  logits = np.full((1, 3, 5), -4.0, np.float32)
  logits[0, [0, 1, 2], [2, 2, 1]] = 3, 4, 2
  boxes = np.array(
    [[[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4]]], np.float32
  )
  outputs = {"logits": logits, "boxes_cxcywh": boxes}
  outputs |= {f"auxiliary_{name}": 0 * x[None] for name, x in outputs.items()}
  kept, suppressed = (detr.detections(outputs, 1, suppress=suppress) for suppress in (False, True))
  np.testing.assert_allclose(kept["boxes_xyxy"][0, 1], (20.48, 19.2, 46.08, 44.8), rtol=1e-5)
  np.testing.assert_array_equal(kept["labels"], [[2, 2, 1]])
  np.testing.assert_array_equal(suppressed["boxes_xyxy"][0, 0], np.zeros(4))
  np.testing.assert_array_equal(suppressed["boxes_xyxy"][0, 1:], kept["boxes_xyxy"][0, 1:])


class TestLambdas:
  @pytest.fixture
  def inputs(self):
    shapes = {"q": (2, 4, 4, 2, 3), "k": (2, 4, 4, 1, 3), "v": (2, 4, 4, 1, 5), "e": (7, 7, 1, 3)}
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes.values()]

  @pytest.fixture
  def apply(self, inputs, monkeypatch):
    """Returns a function of a patch: the output of the patched lambdas."""
    claim = common.load_claim("lambda_resnet")
    layer = claim._layer()

    def output(patch):
      with monkeypatch.context() as undo:
        undo.setattr(layer, "apply_lambdas", layer.apply_lambdas)
        if patch:
          getattr(claim, patch)()
        return np.asarray(layer.apply_lambdas(*inputs, bias=None).output)

    return output

  def test_content_and_position_add_up(self, apply):
    content, position = apply("content_only"), apply("position_only")
    np.testing.assert_allclose(content + position, apply(None), atol=1e-5)
    assert np.abs(content).mean() > 0.05
    assert np.abs(position).mean() > 0.05

  def test_self_attention_as_written(self, inputs, apply):
    """One query's softmax over q k + q r of all positions, in numpy."""
    q, k, v, e = (np.asarray(x) for x in inputs)
    offsets = np.array([[e[3 + y - 1, 3 + x - 2, 0] for x in range(4)] for y in range(4)])
    logits = np.einsum("c,yxc->yx", q[1, 1, 2, 0], k[1, :, :, 0] + offsets)
    weights = np.exp(logits) / np.exp(logits).sum()
    expected = np.einsum("yx,yxv->v", weights, v[1, :, :, 0])
    np.testing.assert_allclose(apply("self_attention")[1, 1, 2, 0], expected, rtol=1e-4)


def test_pyramid_transformers_left_out(monkeypatch):
  from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer as Pyramid

  fpt = common.load_claim("fpt")
  for kind in fpt.KINDS.values():
    monkeypatch.setattr(Pyramid, f"_{kind}", getattr(Pyramid, f"_{kind}"))  # restored at the end
  fpt.keep(("ST",))()
  maps = [jnp.zeros((1, side, side, 8)) for side in (8, 4)]
  shapes = jax.eval_shape(Pyramid(width=8).init, jax.random.key(0), maps)["params"]
  assert {name.partition("_")[0] for name in shapes} == {"lateral", "self", "join"}
  assert shapes["join_0"]["kernel"].shape == (
    3,
    3,
    16,
    8,
  )  # self-attention and the level
