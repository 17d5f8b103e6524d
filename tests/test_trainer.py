"""Runs of a config: fields from the data, outputs, resume, evaluation, errors."""

import functools
import json
import pathlib
import re
import shutil
import sys
import threading

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import vit_jax_zoo
from tests.conftest import GOLDENS, system_module
from vit_jax_zoo import cli, main, predict, trainer
from vit_jax_zoo import config as config_lib
from vit_jax_zoo import run_metadata as run_config
from vit_jax_zoo.builder import Experiment, build
from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.sources.base import SlicedSource
from vit_jax_zoo.tasks.classification import Classification
from vit_jax_zoo.training.checkpoint import restore_variables
from vit_jax_zoo.training.evaluate import Report
from vit_jax_zoo.training.metric_writer import read_metrics
from vit_jax_zoo.training.train_step import TrainingOptions

VIT = system_module("vit", "model")
PACKAGE = pathlib.Path(vit_jax_zoo.__file__).parent
RATE = 0.00125
FLAG = f"--config.optimizer.learning_rate={RATE}"


def tiny(**fields):
  config = config_lib.load("configs/vit.py:demo,num_steps=4,batch_size=16")
  config.model.update(width=16, depth=1, mlp_dim=16, num_heads=2)
  config.data.eval.test.split = "test[:20]"
  config.log_every, config.eval_every, config.checkpoint.every = 2, 4, 4
  config.task.label_smoothing, config.ema_decay, config.explain = 0.0, None, False
  config.optimizer.schedule.warmup_steps = 1
  with config.ignore_type():
    config.update(fields)
  return config


def run(config, workdir, *, figures=False, **options):
  with pytest.MonkeyPatch.context() as patch:
    if not figures:  # a quarter of the time of a short run
      for name in ("batch_figures", "figures"):
        patch.setattr(Classification, name, lambda *_: {})
    return trainer.run(config, epath.Path(workdir), trainer.RunOptions(**options))


def on_devices(count):
  return functools.partial(build, devices=jax.devices()[:count])


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "build", on_devices(1))
    yield


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
  """Outcome, folder and calls of a run; its loop is the first to trace the step."""
  workdir = tmp_path_factory.mktemp("finished")
  model, loop = "systems/vit/model.py:VisionTransformer.__call__", "training/loop.py:Loop.run"
  with pytest.MonkeyPatch.context() as patch, Calls(has_image, model, (loop,)) as calls:
    patch.setattr(trainer, "count_flops", lambda *_: 1.0)
    outcome = run(tiny(), workdir, figures=True)
  return outcome, workdir, calls


@pytest.fixture(scope="module")
def finished(first_run):
  return first_run[:2]


def test_fields_from_data():
  made = trainer.build(tiny())
  assert made.model.num_classes == made.task.num_classes == 10
  assert made.task.class_names == tuple("0123456789")
  assert made.num_steps == 4


def test_num_epochs_to_num_steps():
  made = trainer.build(tiny(num_steps=None, num_epochs=2.0))
  assert made.num_steps == round(2 * 1437 / 16)
  assert trainer.build(tiny(num_steps=7, num_epochs=2.0)).num_steps == 7


@pytest.fixture(scope="module")
def again(tmp_path_factory):
  """A run like `finished` with one metric and explanations, its opened data and its traces."""
  workdir, opened, traced = tmp_path_factory.mktemp("again"), [], []
  config = tiny(explain=True)
  config.data.eval.test.metrics = ("accuracy",)
  original = trainer.Experiment.train_batches
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      trainer.Experiment,
      "train_batches",
      lambda self, *args: opened.append(args) or original(self, *args),
    )
    for name in ("init", "loss", "predict", "explain"):
      function = counted(getattr(Classification, name), name, traced)
      patch.setattr(Classification, name, function)
    outcome = run(config, workdir)
    traces = sorted(traced)
    rows, saved = read_metrics(workdir), sorted((workdir / "checkpoints").iterdir())
    rescored = run(config, workdir)
  assert (rows, saved) == (read_metrics(workdir), sorted((workdir / "checkpoints").iterdir()))
  assert rescored.scores == outcome.scores
  return outcome, workdir, opened, traces


def counted(function, name, calls):
  return lambda *args: calls.append(name) or function(*args)


def test_metrics_selected_in_config(again):
  rows = read_metrics(again[1])
  written = {name for row in rows for name in row if name.startswith("test/")}
  assert written == {"test/accuracy"}


def test_explanation_figures_written(again):
  assert list((again[1] / "figures").glob("explain_*.png"))


def test_same_seed_bit_exact(again, finished):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    again[0].state.params,
    finished[0].state.params,
  )


def test_training_data_opened_once(again):
  assert again[2] == [(0,)]


def test_model_traced_once_for_each_step(again):
  assert again[3] == ["explain", "init", "loss", "predict"]


@pytest.mark.parametrize(
  ("method", "warning"), [(None, "VisionTransformer"), (lambda *_: 1 / 0, "division by zero")]
)
def test_model_without_explanations(finished, tmp_path, monkeypatch, caplog, method, warning):
  """Also one whose explanation fails; evaluations of a training run are the same function."""
  if method is None:
    monkeypatch.delattr(VIT.VisionTransformer, "explain")
  else:
    monkeypatch.setattr(VIT.VisionTransformer, "explain", method)
  shutil.copytree(finished[1], tmp_path / "run", ignore=shutil.ignore_patterns("figures"))
  outcome = run(tiny(explain=True), tmp_path / "run", eval_only=True, allow_config_change=True)
  assert outcome.scores == finished[0].scores
  assert f"explain: {warning}" in caplog.text
  assert not list(tmp_path.rglob("*explain*"))


def test_evaluation_of_other_size_raises_at_start(tmp_path, monkeypatch):
  monkeypatch.setattr(trainer.Program, "initial_state", None)
  config = tiny()
  config.model.position_embedding = "learned_1d"
  config.data.eval.test.transforms = [{"name": "resize", "size": 12}]
  with pytest.raises(
    ValueError, match=r"data\.eval\.test\.transforms: .*\(12, 12\); expected \(8, 8\)"
  ):
    run(config, tmp_path)


def test_evaluation_without_input_of_model_raises_at_start(tmp_path, monkeypatch):
  def predict(self, variables, batch):
    return batch["depth"]

  monkeypatch.setattr(Classification, "predict", predict)
  with pytest.raises(ValueError, match=r"^data\.eval\.test: .*; expected .*\(KeyError: 'depth'\)$"):
    run(tiny(), tmp_path)


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_missing_evaluation_files_raise_at_start(tmp_path, monkeypatch, on_corrupt):
  monkeypatch.setattr(trainer.Program, "initial_state", None)
  monkeypatch.setattr(SlicedSource, "missing", lambda self: range(20 * (len(self) == 20)))
  config = tiny()
  config.data.loader.on_corrupt = on_corrupt
  with pytest.raises(FileNotFoundError, match=r"20 files are missing"):
    run(config, tmp_path)


@pytest.mark.parametrize(
  ("metrics", "best", "message"),
  [
    (("acuracy",), None, r"data\.eval\.test\.metrics.*'acuracy'.*'accuracy'"),
    (("loss",), None, r"data\.eval\.test\.metrics: no 'accuracy'"),
    (("accuracy",), "test/loss", r"data\.eval\.test\.metrics: no 'loss'"),
    ((), "test/acuracy", r"checkpoint\.best 'acuracy'; did you mean 'accuracy'"),
    ((), "test/acuracy/cat", r"checkpoint\.best 'acuracy'; did you mean 'accuracy'"),
  ],
)
def test_invalid_metrics_raise(metrics, best, message):
  config = tiny()
  config.data.eval.test.metrics = metrics
  with config.ignore_type():
    config.checkpoint.best = best
  with pytest.raises(ValueError, match=message):
    trainer.build(config)


def test_float64_without_x64_raises():
  config = tiny()
  with config.ignore_type(), config.unlocked():
    config.model.dtype = "float64"
  with pytest.raises(ValueError, match=r"config\.model\.dtype: float64 needs JAX_ENABLE_X64=1"):
    trainer.build(config)


def test_extra_sources_joined():
  config = config_lib.load("configs/vit.py:demo,batch_size=16")
  config.data.train.extra_sources = ({"source": "demo:digits", "split": "test[:50]"},)
  made = trainer.build(config)
  assert len(made.train_source) == 1437 + 50
  assert next(made.train_batches())["image"].shape[0] == 16
  config.data.train.extra_sources = ({"source": "demo:photos", "split": "train"},)
  with pytest.raises(ValueError, match="demo:photos train"):
    trainer.build(config)


def test_defaults_complete():
  config = config_lib.complete(config_lib.load("configs/vit.py"))
  assert config.keys() == config_lib.defaults().keys()
  assert (config.accumulation_steps, config.eval_batch_size, config.init_from) == (1, None, None)


def test_run_outputs(finished):
  outcome, workdir = finished
  assert outcome.finished
  assert set(outcome.scores) >= {"test/accuracy", "test/loss", "test/images"}
  assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 16
  assert (workdir / "best").exists()
  assert (workdir / "figures" / "train_batch_00000000.png").exists()


def test_last_lines_list_scores_and_outputs(finished, caplog):
  outcome, workdir = finished
  caplog.set_level("INFO", logger="absl")
  main._log_outcome(outcome)
  text = caplog.text.replace("python -m tensorboard.main", "tensorboard")
  assert f"done after 4 steps: test/accuracy {outcome.scores['test/accuracy']:.4g}" in text
  for place in ("checkpoints", "metrics.jsonl", "figures"):
    assert str(workdir / place) in text
  assert f"tensorboard --logdir={workdir}" in text
  assert list((workdir / "figures").glob("test_predictions_*.png"))


def test_eval_only_needs_no_training_data(finished, monkeypatch):
  outcome, workdir = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  figures = sorted((workdir / "figures").iterdir())
  drawn = [path for path in figures if path.name.startswith("test_")]
  for path in drawn:
    path.unlink()
  moved = tiny(explain=True)  # the training data were moved
  moved.data.train.source = "folder:/moved/away"
  opened, iterate = [], pipeline._iterate
  monkeypatch.setattr(pipeline, "_iterate", lambda *args: opened.append(args) or iterate(*args))
  again = run(moved, workdir, figures=True, eval_only=True, allow_config_change=True)
  assert len(opened) == 1
  assert again.scores == outcome.scores
  assert (workdir / "metrics.jsonl").read_bytes() == before
  assert drawn
  assert drawn[-1].exists()  # the figures of the last step are drawn again


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
  """Outcome and folder of a run with feature probes, on other classes, and with EMA."""
  workdir = tmp_path_factory.mktemp("probed")
  config = tiny(ema_decay=0.9999)
  data = {
    "source": "demo:photos",
    "split": "test[:24]+test[40:64]",
    "fit_split": "train[:40]+train[60:100]",
    "transforms": [{"name": "resize", "size": 8}],
  }
  config.data.eval.few_shot = data | {"probe": {"name": "few_shot", "shots": (1, 5)}}
  config.data.eval.near = data | {"probe": {"name": "knn"}}
  return run(config, workdir), workdir


def test_probes_during_training(probed):
  """The best checkpoint depends on the main evaluation only."""
  outcome, workdir = probed
  for name in ("few_shot/5_shot", "few_shot/1_shot", "few_shot/accuracy", "near/20_nn"):
    assert 0 <= outcome.scores[name] <= 1
  assert outcome.scores["few_shot/accuracy"] == outcome.scores["few_shot/5_shot"]
  steps = [row["step"] for row in read_metrics(workdir) if "few_shot/5_shot" in row]
  assert steps == [4]
  kept = json.loads((workdir / "config.json").read_text())
  assert run_config.main_evaluation(kept["data"]["eval"]) == "test"


def test_invalid_probes_raise():
  config = tiny()
  config.data.eval.test.probe = {"name": "knn"}
  with pytest.raises(ValueError, match=r"data\.eval\.test\.fit_split"):
    trainer.build(config)
  config.data.eval.test.update(fit_split="train", probe={"name": "few_shots"})
  with pytest.raises(ValueError, match="probe 'few_shots'"):
    trainer.build(config)


def test_resume_with_other_mesh_and_logging(finished, monkeypatch):
  _, workdir = finished
  changed = tiny(log_every=1)
  changed.sharding.mesh.update(data=1, fsdp=-1)
  monkeypatch.setattr(trainer, "build", on_devices(2))
  assert run(changed, workdir).finished
  with pytest.raises(ValueError, match=r"seed: 0 -> 1.*--workdir"):
    run(tiny(seed=1), workdir)
  assert run(tiny(seed=1), workdir, allow_config_change=True).finished


def test_overfit_one_batch_reduces_loss(tmp_path):
  config = tiny(num_steps=60, log_every=10, eval_every=0)
  config.checkpoint.every = 60
  config.model.update(width=32)
  config.optimizer.schedule.warmup_steps = 5
  outcome = run(config, tmp_path, overfit_one_batch=True)
  assert outcome.workdir == tmp_path / "overfit_one_batch"
  assert list(tmp_path.iterdir()) == [outcome.workdir]  # the actual training does not resume it
  losses = [row["train/loss"] for row in read_metrics(outcome.workdir) if "train/loss" in row]
  assert losses[0] > 1.0
  assert losses[-1] < 0.5 * losses[0]  # with 60 different batches it stays above 0.8


def test_eval_only_without_checkpoint_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*/typo"):
    run(tiny(), tmp_path / "typo", eval_only=True)
  assert not (tmp_path / "typo").exists()


def test_profile_outside_run_raises(tmp_path):
  with pytest.raises(ValueError, match=r"--profile=9:12: .*1 to 4"):
    run(tiny(), tmp_path, profile=(9, 12))


@pytest.mark.slow
def test_truncated_config_json_ignored(tmp_path):
  run(tiny(), tmp_path)
  (tmp_path / "config.json").write_text("{")
  assert run(tiny(), tmp_path).finished


def test_config_json_without_recipe_accepted(tmp_path):
  config = trainer.build(tiny()).config
  old = {k: v for k, v in run_config.as_json(config).items() if k != "recipe"}
  (tmp_path / "config.json").write_text(json.dumps(old))
  run_config.check_unchanged(config, None, epath.Path(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps(old | {"seed": 9}))
  with pytest.raises(ValueError, match="seed: 9 -> 0"):
    run_config.check_unchanged(config, None, epath.Path(tmp_path))


@pytest.mark.parametrize(
  ("folder", "options", "name"),
  [
    ("b", {}, "--workdir: "),
    ("a", {"eval_only": True}, "--eval_only: False on process 0, True"),
    ("a", {"overfit_one_batch": True}, "--overfit_one_batch: "),
    ("a", {"profile": (2, 3)}, "--profile: "),
    ("a", {"allow_config_change": True}, "--allow_config_change: "),
    ("a", {}, "newest step in .*a/checkpoints.*: None on process 0, 4"),
  ],
)
def test_processes_compare_flags_and_steps_first(tmp_path, monkeypatch, folder, options, name):
  def gather(value):
    if not options and folder == "a":  # as on another machine
      (tmp_path / "a/checkpoints/4").mkdir(parents=True)
    other = epath.Path(tmp_path / folder), trainer.RunOptions(**options)
    return [value, trainer._run_settings(*other)]

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr("vit_jax_zoo.training.distributed.all_gather_objects", gather)
  with pytest.raises(ValueError, match=f"^{name}"):
    run(tiny(), tmp_path / "a")
  assert not (tmp_path / "a/lock.json").exists()


def test_swapped_class_names_raise_on_resume(finished):
  _, workdir = finished
  data = json.loads((workdir / "data.json").read_text())
  names = data["class_names"]
  (workdir / "data.json").write_text(
    json.dumps(data | {"class_names": [names[1], names[0], *names[2:]]})
  )
  with pytest.raises(ValueError, match="class 0: 1 -> 0"):
    run(tiny(), workdir)
  (workdir / "data.json").write_text(json.dumps(data))
  assert run(tiny(), workdir).finished


def test_run_of_version_0_1_resumes(tmp_path, monkeypatch):
  """Its config has old field names, its checkpoints no manifest; see tests/goldens/README.md."""
  shutil.copytree(GOLDENS / "run_0_1", tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  assert "score_best" in json.loads((tmp_path / "run" / "config.json").read_text())["checkpoint"]
  config = config_lib.load("configs/vit.py:demo,num_steps=4,batch_size=16")
  config.model.update(width=16, depth=2, mlp_dim=16, num_heads=2)
  config.log_every, config.eval_every, config.checkpoint.every = 2, 4, 2
  config.ema_decay, config.data.eval.test.split = 0.9, "test[:40]"
  monkeypatch.setattr(trainer.evaluate, "explain", lambda *_, **__: Report({}))  # not compared
  outcome = run(config, tmp_path / "run")
  expected = restore_variables(GOLDENS / "run_0_1" / "checkpoints" / "4")
  jax.tree.map(
    lambda found, old: np.testing.assert_allclose(found, old, rtol=1e-5, atol=1e-6),
    jax.device_get(outcome.state.variables),
    expected,
  )
  assert read_metrics(tmp_path / "run")[0] == read_metrics(GOLDENS / "run_0_1")[0]


def test_ema_parameters_evaluated(finished, probed):
  plain, averaged = finished[0], probed[0]
  chance = np.log(10)  # with this decay the average is still close to the initial state
  assert abs(averaged.scores["test/loss"] - chance) < 0.1 * abs(plain.scores["test/loss"] - chance)


def test_dataset_metadata_saved(finished):
  config, data = run_config.load_run(finished[0].workdir)
  assert config["model"]["num_classes"] is None
  assert run_config.fill_from_data(config["model"], data)["num_classes"] == 10
  assert data.class_names == tuple("0123456789")
  assert data.shapes["image"] == (8, 8, 3)


class Calls:
  """Records the functions of the package, in all threads, through which a value passes to `last`.

  They are those that return it, and those that have it in a variable and are on the stack when
  `last` is called. `holds` tells whether an object has the value; in the main thread, only calls
  within `first` are recorded.
  """

  def __init__(self, holds, last, first=()):
    self.holds, self.last, self.first, self.found, self.is_done = holds, last, first, set(), False

  def __enter__(self):
    threading.setprofile(self._record)
    sys.setprofile(self._record)
    return self

  def __exit__(self, *_):
    sys.setprofile(None)
    threading.setprofile(None)

  def _record(self, frame, event, result):
    if event not in ("call", "return"):
      return
    if self.is_done:
      sys.setprofile(None)
      return
    name = name_of(frame)
    if not name or not self._is_inside(frame):
      return
    if event == "return" and self.holds(result):
      self.found.add(name)
    if event == "call" and name == self.last:
      self.is_done = True
      stack = iter_stack(frame)
      self.found |= {name_of(f) for f in stack if any(map(self.holds, f.f_locals.values()))} - {""}

  def _is_inside(self, frame):
    if not self.first or threading.current_thread() is not threading.main_thread():
      return True
    return any(name_of(above) in self.first for above in iter_stack(frame))


def iter_stack(frame):
  while frame is not None:
    yield frame
    frame = frame.f_back


IS_OF_PACKAGE = {}  # by file


def name_of(frame):
  """Returns "file:function" of a function of the package; "" for others, and for comprehensions."""
  file = frame.f_code.co_filename
  is_ours = IS_OF_PACKAGE.get(file)
  if is_ours is None:
    is_ours = IS_OF_PACKAGE[file] = file.startswith(f"{PACKAGE}/")
  if not is_ours:
    return ""
  name = frame.f_code.co_qualname.replace("<locals>.", "")
  return "" if "<" in name else f"{file.removeprefix(f'{PACKAGE}/')}:{name}"


def is_part_of_caller(name):
  """Whether a function is a private helper with a single use."""
  file, _, function = name.partition(":")
  function = function.rpartition(".")[2]
  uses = re.findall(rf"\b{function}\b", (PACKAGE / file).read_text())
  return function.startswith("_") and not function.endswith("__") and len(uses) == 2


def has_image(value):
  """Whether a value is, or contains, an image of 8x8 pixels, encoded or not."""
  if isinstance(value, dict):
    return has_image(value.get("image"))
  if isinstance(value, list | tuple):
    return any(map(has_image, value))
  if isinstance(value, bytes):
    return value.startswith(b"\x89PNG") and value[16:24] == bytes([0, 0, 0, 8] * 2)
  shape = getattr(value, "shape", None)
  return isinstance(shape, tuple) and (shape == (8, 8) or shape[-3:-1] == (8, 8))


def has_rate(value):
  """Whether a value is, or contains, the flag of the learning rate or its value."""
  if isinstance(value, Experiment):
    return True
  if isinstance(value, TrainingOptions):
    value = value.optimizer
  if isinstance(value, dict | ConfigDict):
    return any(has_rate(value[key]) for key in ("learning_rate", "optimizer") if key in value)
  if isinstance(value, list | tuple):
    return any(map(has_rate, value))
  return isinstance(value, float | str) and value in (RATE, FLAG)


def called(monkeypatch, command, arguments, calls, **options):
  monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
  monkeypatch.setattr(cli.host, "keep_freed_memory", lambda: None)
  with flagsaver.flagsaver(), calls, pytest.raises(SystemExit) as ended:
    cli.run(command, **options)
  assert ended.value.code == 0
  return calls.found


def assert_lists(heading, found, at_most):
  """Checks that the numbered list below a heading of CONTRIBUTING has the functions of a run."""
  page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
  text = page.partition(heading)[2].partition("\n\n")[2].partition("\n\n")[0]
  rows = re.findall(r"(?m)^\d+\. `([\w/*]+\.py:[\w.]+)`", text)
  assert len(rows) == len(text.strip().split("\n")) <= at_most
  assert sorted(rows) == sorted(name for name in found if not is_part_of_caller(name))


def test_batch_to_loss_as_listed(first_run):
  assert_lists("From an example's file to its loss", first_run[2].found, at_most=20)


def test_flag_to_effect_as_listed(monkeypatch, tmp_path):
  arguments = ("main", "--config=configs/vit.py", f"--workdir={tmp_path}", FLAG)
  monkeypatch.setattr(trainer, "_initial_state", lambda *_: sys.exit(0))
  calls = Calls(has_rate, "training/optim.py:create_schedule")
  found = called(monkeypatch, main.main, arguments, calls)
  assert_lists("From a flag", found, at_most=10)


def test_file_to_logits_as_listed(first_run, monkeypatch, tmp_path):
  file = tmp_path / "a.png"
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)

  def has_file(value):
    if isinstance(value, list | tuple):
      return any((isinstance(x, str) and x == str(file)) or has_file(x) for x in value)
    return has_image(value) or (isinstance(value, pathlib.Path) and value == file)

  arguments = ("predict", f"--model={first_run[1]}", f"--output={tmp_path}", file)
  model = "systems/vit/model.py:VisionTransformer.__call__"
  first = ("cli.py:run.parse", "predict.py:find_images", "predict.py:predict_all")
  calls = Calls(has_file, model, first)  # not the model's loading, which also calls it
  found = called(monkeypatch, predict.main, arguments, calls, define_flags=predict.define_flags)
  assert_lists("From an image file to its logits", found, at_most=15)
