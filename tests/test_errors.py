"""User errors: one line with the field or file and the fix."""

import asyncio
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from absl import flags
from absl import logging as absl_logging
from absl.testing import flagsaver
from etils import epath

from tests import command
from tests.conftest import system_module
from vit_jax_zoo import builder, cli, main, trainer
from vit_jax_zoo import config as config_lib
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.optim import create_optimizer

system_module("vit")


def demo_with(**fields):
  """Returns the demo's config with fields set by their dotted names (`__` for the dot)."""
  config = config_lib.load("configs/vit.py:demo,batch_size=16")
  with config.ignore_type(), config.unlocked():
    for name, value in fields.items():
      config.update_from_flattened_dict({name.replace("__", "."): value})
  return config


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model__name": "vit_tii16"}, "'vit_tii16'.*'vit_ti16'"),
    ({"model__widht": 8}, "'widht'.*'width'"),
    ({"task__name": "clasification"}, "'clasification'.*'classification'"),
    ({"task__label_smothing": 0.1}, "'label_smothing'.*'label_smoothing'"),
    ({"data__train__source": "demo:digit"}, "demo 'digit'.*'digits'"),
    ({"data__train__source": "dmo:digits"}, "source 'dmo'.*'demo'"),
    ({"data__train__split": "trian"}, "split 'trian'.*'train'"),
    ({"data__train__source": "tfds:imagenet2012", "data__train__data_dir": "/nowhere"},
     "data.prepare --dataset=imagenet2012 .*demo:"),
    ({"data__train__source": "folder:/nowhere/at/all"}, r"/nowhere/at/all"),
    ({"batch_size": 12, "sharding__mesh__data": 8},
     "batch_size: 12 .*8 device"),
    ({"sharding__mesh__data": 3}, "mesh data=3 .*8 device"),
    ({"data__loader__num_worker": 1}, "'num_worker'.*'num_workers'"),
    ({"data__loader__num_workers": -1}, "data.loader.num_workers: -1"),
    ({"checkpoint__best": "tset/accuracy"}, "checkpoint.best 'tset'.*'test'"),
    ({"num_steps": None}, "num_steps or num_epochs"),
    ({"model__patch_size": (4, 4)}, r"vit_ti16: patch_size is \(4, 4\); expected an integer"),
    ({"model__width": 3.5}, r"width is 3\.5"),
    ({"model__scan_layers": 7}, "scan_layers is 7; expected True or False"),
    ({"model__dropout_rate": "a"}, "dropout_rate is 'a'; expected a number"),
    ({"task__label_smoothing": "a"}, "label_smoothing is 'a'"),
    ({"model__dtype": "fp16"}, "dtype of vit_.* 'fp16'.*bfloat16"),
    ({"model__dtype": "float16"}, "config.model.dtype: float16"),
    ({"data__train__extra_sources": "demo:photos"}, "extra_sources: 'd'; expected"),
    ({"data__train__extra_sources": [{"source": "demo:digits"}]}, "extra_sources: .* split"),
    ({"data__train__source": "../photos"}, r"folder:\.\./photos\?"),
    ({"data__train__source": "Folder:/nowhere"}, "did you mean 'folder'"),
    ({"data__train__source": "tfds:/nowhere/1.0.0"}, "tfds:/nowhere/1.0.0"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_invalid_config_raises(fields, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    trainer.build(demo_with(**fields))
  assert "\n" not in str(error.value)


def trace_step(config):
  """Traces the training step, as a run does before compilation."""
  made = trainer.build(config)
  program = made.program(next(made.train_batches()))
  with jax.set_mesh(made.mesh):
    jax.eval_shape(program.train_step, program.abstract_state, program.abstract_batch)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"optimizer__name": "adamv"}, "'adamv'.*'adam'"),
    ({"optimizer__learning_rat": 1.0}, "'learning_rat'.*'learning_rate'"),
    ({"optimizer__schedule__name": "cosin"}, "'cosin'.*'cosine'"),
    ({"model__patch_size": 3}, "image height: 8 .*stride 3"),
    ({"model__num_classes": 7}, "num_classes: 7 .*10"),
    ({"data__train__transforms": [{"name": "random_flp"}]}, "'random_flp'.*'random_flip'"),
    ({"data__train__transforms": [{"name": "resize", "size": "x"}]}, "resize.*size is 'x'"),
    ({"task__num_classes": 4, "task__class_names": (), "model__num_classes": 4},
     r"label \d.*num_classes=4"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_invalid_run_raises(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    trace_step(demo_with(**fields))
  assert "\n" not in str(error.value)


@pytest.fixture
def folder_with_broken_image(tmp_path):
  rng = np.random.default_rng(0)
  for name in ("cat", "dog"):
    (tmp_path / "images" / name).mkdir(parents=True)
    for i in range(8):
      image = rng.integers(0, 255, (8, 8, 3), np.uint8)
      cv2.imwrite(str(tmp_path / "images" / name / f"{i}.png"), image)
  broken = tmp_path / "images" / "dog" / "3.png"
  broken.write_bytes(broken.read_bytes()[:60])
  return tmp_path / "images"


def from_folder(folder, **fields):
  data = {"source": f"folder:{folder}", "split": "train[:100%]+test", "transforms": []}
  fields = {"data__train": data, "data__eval": {}, **fields}
  return demo_with(**fields)


def test_corrupt_image_raises(folder_with_broken_image):
  made = trainer.build(from_folder(folder_with_broken_image))
  with pytest.raises(ValueError, match=r"dog/3\.png.* data\.loader\.on_corrupt"):
    for _, _batch in zip(range(3), made.train_batches(), strict=False):
      pass


def test_corrupt_image_skipped_and_counted(folder_with_broken_image):
  config = from_folder(folder_with_broken_image, data__loader__on_corrupt="skip")
  made = trainer.build(config)
  assert made.train_source.info.class_names == ("cat", "dog")
  assert made.model.num_classes == 2  # taken from the data
  batches = made.train_batches()
  for _ in range(3):
    assert next(batches)["image"].shape == (16, 8, 8, 3)
  assert batches.num_skipped >= 2  # three batches of 16 are three epochs


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("configs/vti.py", r"configs/vti.py.*configs/vit.py\?"),
    ("vti", r"configs/vit.py\?"),
    ("configs/vit.py:dmo", "variant 'dmo'.*'demo'"),
    ("configs/vit.py:demo,num_step=3", "'num_step'.*'num_steps'"),
    ("configs/vit.py:demo,num_steps=x", "demo,num_steps='x': "),
  ],
)
def test_misspelt_config_raises(argument, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    config_lib.load(argument)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["def get_config(:", "def get_config():\n  x\nnosuch"])
def test_config_file_error_names_file(tmp_path, text):
  (tmp_path / "own.py").write_text(text)
  with pytest.raises(ValueError, match=r"own\.py: (SyntaxError|NameError): ") as error:
    config_lib.load(str(tmp_path / "own.py"))
  assert "\n" not in str(error.value)


def test_absolute_config_path_from_other_folder(tmp_path, monkeypatch):
  path = str(command.ROOT / "configs" / "vit.py")
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(f"{path}:demo,num_steps=3").num_steps == 3


def test_field_of_several_optimizers_raises():
  system_module("ttsr")
  config = config_lib.load("configs/ttsr.py")
  with pytest.raises(ValueError, match=r"set --config\.optimizer\.generator\.name"):
    config_lib.apply_overrides(config, ["--config.optimizer.name=sgd"])


@pytest.mark.parametrize("path", ["/nowhere/ViT-B_16.npz", "vit_b17_imagenet"])
def test_missing_init_from_raises_before_data(tmp_path, path, monkeypatch):
  monkeypatch.setattr(builder.pipeline, "train_batches", None)
  with pytest.raises(ValueError, match=rf"init_from: .*{path}"):
    trainer.run(demo_with(init_from=path), epath.Path(tmp_path / "run"))


def test_workdir_is_file_raises(tmp_path):
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ValueError, match=f"--workdir={workdir}: not a folder"):
      trainer.run(demo_with(), epath.Path(workdir))


def test_sigint_during_import_one_line():
  code = "import signal, vit_jax_zoo.cli; signal.raise_signal(signal.SIGINT)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_sigint_in_gc_callback_repeated():
  code = """
import gc, signal, time, vit_jax_zoo.cli
gc.callbacks.append(lambda *_: gc.callbacks.clear() or signal.raise_signal(signal.SIGINT))
gc.collect()
time.sleep(60)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
  )
  assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.ema_deca=1", "config 'ema_deca'.*'ema_decay'"),
    ("--config.chekpoint.every=1", "config 'chekpoint'.*'checkpoint'"),
    ("--config.data.eval.tset.split=x", "config.data.eval 'tset'.*'test'"),
    ("--config.sharding=x", "--config.sharding: a section"),
    ("--config.batch_size=1.5", "--config.batch_size=1.5: expected an integer"),
    ("--config.model.patch_size=(4,4)", r"--config.model.patch_size=\(4,4\): expected an integer"),
    ("--config.ema_decay=abc", "--config.ema_decay=abc: expected a number"),
    ("--config.explain=maybe", "--config.explain=maybe: expected true or false"),
    ("--config.data.train.transforms=abc", "transforms=abc: "),
    ("--config.seed", "--config.seed: .*--config.seed="),
    ("--workdir", "argument '--workdir'"),
    ("--config.checkpoint.score_best=True", "now --config.checkpoint.eval_best_at_end"),
    ("--config.data.train.mixed_with=()", "now --config.data.train.extra_sources"),
    ("--config.data.train.label_rule=x", "now --config.data.train.derived_labels"),
    ("--config.task.cutmix_share=1", "now --config.task.cutmix_fraction"),
  ],
)
def test_invalid_override_raises(flag, message):
  with pytest.raises(ValueError, match=message) as error:
    config_lib.apply_overrides(config_lib.load("configs/vit.py"), [flag])
  assert "\n" not in str(error.value)


def test_overrides_set_and_add_fields():
  config = config_lib.load("configs/vit.py")
  flags = [
    "--config.model.remat=dots",
    "--config.optimizer.clip_norm=None",
    "--config.optimizer.schedule.warmup_steps=7",
    "--config.task.label_smoothing=0.1",
    "--config.data.train.data_dir=gs://bucket/data",
    "--config.data.train.transforms=[dict(name='x')]".replace("dict(name='x')", "{'name': 'x'}"),
    "--config.ema_decay=1",
    "--config.model.scan_layers=false",
  ]
  config_lib.apply_overrides(config, flags)
  assert (config.model.remat, config.optimizer.clip_norm) == ("dots", None)
  assert (config.optimizer.schedule.warmup_steps, config.task.label_smoothing) == (7, 0.1)
  assert config.data.train.data_dir == "gs://bucket/data"
  assert config.data.train.transforms == [{"name": "x"}]
  assert isinstance(config.ema_decay, float)
  assert config.model.scan_layers is False  # new to the section, converted from text


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_steps": 0}, "num_steps: 0"),
    ({"num_steps": -3}, "num_steps: -3"),
    ({"seed": -1}, "seed: -1"),
    ({"seed": 1 << 64}, "seed: 1844"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"accumulation_steps": 0}, "accumulation_steps: 0"),
    ({"ema_decay": 1.5}, "ema_decay: 1.5"),
    ({"eval_every": 1.5}, "eval_every: 1.5"),
    ({"log_every": -5}, "log_every: -5"),
    ({"checkpoint__best_mode": "mx"}, "did you mean 'max'"),
    ({"model": {}}, r"config\.model: "),
  ],
)
def test_values_out_of_range_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    trainer.build(demo_with(**fields))


def test_step_counts_or_fractions():
  config = config_lib.load("configs/vit.py")
  assert isinstance(config.optimizer.schedule.warmup_steps, int)
  with config.ignore_type():
    config.eval_every = 0.25
  given = ("--config.optimizer.schedule.warmup_steps=0.05", "--config.eval_every=100")
  config_lib.apply_overrides(config, given)
  assert (config.optimizer.schedule.warmup_steps, config.eval_every) == (0.05, 100)
  config_lib.check_values(config_lib.complete(config))
  with pytest.raises(ValueError, match=r"--config\.log_every=0\.1: "):
    config_lib.apply_overrides(config, ["--config.log_every=0.1"])


def test_new_optimizer_drops_old_fields():
  config = config_lib.load("configs/vit.py:b16_finetune")
  assert config.optimizer.momentum == 0.9
  rate = config.optimizer.learning_rate
  config_lib.apply_overrides(config, ["--config.optimizer.name=adamw", "--config.optimizer.b1=0.8"])
  assert (config.optimizer.name, config.optimizer.b1) == ("adamw", 0.8)
  assert config.optimizer.learning_rate == rate
  assert "momentum" not in config.optimizer
  config = config_lib.load("configs/vit.py:b16_finetune")
  config_lib.apply_overrides(
    config, ["--config.optimizer.name=adamw", "--config.optimizer.momentum=0.8"]
  )
  assert config.optimizer.momentum == 0.8  # as given; the optimizer then raises


def test_config_with_old_field_name_raises(tmp_path):
  config = config_lib.load("configs/vit.py")
  with config.unlocked():
    config.data.train.repeats = 3
  with pytest.raises(ValueError, match=r"data\.train\.repeats is now .*aug_repeats"):
    config_lib.complete(config)


@pytest.mark.parametrize("program", ["main", "other"])  # two commands of one process
def test_old_flag_error_names_new_flag(program, monkeypatch, capsys):
  monkeypatch.setattr(cli.host, "keep_freed_memory", lambda: None)
  monkeypatch.setattr(sys, "argv", [program, "--config=configs/vit.py", "--evaluate_only"])
  with pytest.raises(SystemExit) as ended:
    cli.run(main.main, renamed=main.RENAMED_FLAGS)
  assert ended.value.code == 2
  assert "error: --evaluate_only is now --eval_only\n" in capsys.readouterr().err


def test_removed_field_error_names_replacement():
  for flag, instead in (
    ("--config.model.remat_stages=('c2',)", "remat_stages: .*accumulation_steps"),
    ("--config.task.mix_per=example", "mix_per: .*'batch'"),
  ):
    with pytest.raises(ValueError, match=instead):
      config_lib.load("configs/lambda_resnet.py", [flag])


def test_saved_config_fields_removed():
  saved = {"model": {"backbone": {"remat_stages": ["c2"]}}, "task": {"mix_per": "batch"}}
  assert config_lib.rename_fields(saved) == {"model": {"backbone": {}}, "task": {}}
  with pytest.raises(ValueError, match=r"task\.mix_per"):
    config_lib.rename_fields({"task": {"mix_per": "example"}})


def test_saved_config_fields_renamed():
  old = {
    "checkpoint": {"score_best": True},
    "data": {
      "train": {"repeats": 3},
      "eval": {"val": {"mixed_with": [], "transforms": [{"name": "keep_prefix", "share": 1.0}]}},
    },
  }
  assert config_lib.rename_fields(old) == {
    "checkpoint": {"eval_best_at_end": True},
    "data": {
      "train": {"aug_repeats": 3},
      "eval": {
        "val": {"extra_sources": [], "transforms": [{"name": "keep_prefix", "fraction": 1.0}]}
      },
    },
  }


def test_unknown_config_field_raises():
  config = config_lib.load("configs/vit.py")
  with config.unlocked():
    config.data.tarin = {}
  with pytest.raises(ValueError, match=r"config.data 'tarin'.*'train'"):
    config_lib.complete(config)


def test_command_error_one_line_without_traceback(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cli.host, "keep_freed_memory", lambda: None)
  arguments = ["main", "--config=configs/vit.py", "--config.model.patch_size=3"]
  monkeypatch.setattr(sys, "argv", [*arguments, f"--workdir={tmp_path}"])
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
    cli.run(main.main)
  assert ended.value.code == 2
  output = "".join(capsys.readouterr())
  errors = [line for line in output.splitlines() if line.startswith("error:")]
  assert len(errors) == 1
  assert "Traceback" not in output
  assert not (tmp_path / "config.json").exists()  # a corrected command can use the same workdir


def test_closed_stdout_ends_quietly():
  """As in `predict ... | head`."""
  read, write = os.pipe()
  os.close(read)
  code = "from vit_jax_zoo import cli; cli.show('a.jpg  cat')"
  options = {"stdout": write, "stderr": subprocess.PIPE, "cwd": command.ROOT}
  done = subprocess.run([sys.executable, "-c", code], check=False, text=True, **options)
  os.close(write)
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_control_characters_escaped(capsys):
  """File and class names must not move the cursor or change the terminal's title."""
  name = "a\x1b]0;title\x07\x9b2J\u202ecat.jpg"
  escaped = r"a\x1b]0;title\x07\x9b2J\u202ecat.jpg"
  with pytest.raises(SystemExit), cli.one_line_errors(show_traceback=False):
    raise ValueError(f"{name}: cannot be read")
  assert capsys.readouterr().err == f"error: {escaped}: cannot be read\n"
  cli.log_plainly()
  record = logging.makeLogRecord({"msg": "%s: %s", "args": (name, "größer\tals\nzwei")})
  assert absl_logging.get_absl_handler().format(record).endswith(f"{escaped}: größer\tals\nzwei")


def test_line_break_in_name_escaped():
  cli.log_plainly()
  fields = {
    "msg": "%s",
    "args": ("a\nerror: b.jpg",),
    "pathname": "vit_jax_zoo/x.py",
    "levelno": 30,
  }
  line = absl_logging.get_absl_handler().format(logging.makeLogRecord(fields))
  assert line.endswith(r" a\nerror: b.jpg")


def test_traceback_flag():
  printed = io.StringIO()
  with (
    contextlib.redirect_stderr(printed),
    pytest.raises(SystemExit) as ended,
    cli.one_line_errors(show_traceback=True),
  ):
    raise KeyError("what was wrong")
  assert ended.value.code == 2
  assert "Traceback" in printed.getvalue()
  assert printed.getvalue().endswith("error: what was wrong\n")


@pytest.mark.parametrize(("closed", "is_printed"), [(True, False), (False, True)])
def test_late_event_loop_errors_suppressed(closed, is_printed, capfd, monkeypatch):
  loop = asyncio.new_event_loop()
  loop.close()

  class Late:
    def __del__(self):
      if closed:
        loop.call_soon(print)  # raises RuntimeError
      raise RuntimeError("something of ours")

  monkeypatch.setattr(sys, "unraisablehook", cli._report_unraisable)
  late = Late()
  del late
  assert ("Error" in capfd.readouterr().err) == is_printed


@pytest.mark.parametrize("text", ["3", "5:3", "a:b", "0:4"])
def test_invalid_profile_window_raises(text):
  with pytest.raises(ValueError, match=r"--profile=.*first:last"):
    main.parse_window(text)


def test_default_workdir():
  assert main.default_workdir("configs/vit.py") == "runs/vit_demo"
  name = main.default_workdir("configs/vit.py:b16_imagenet,image_size=384")
  assert name == "runs/vit_b16_imagenet_image_size_384"


@pytest.mark.parametrize(
  ("text", "wrong"),
  [
    ("get_config = 3", "get_config"),
    ("import nothere", "ModuleNotFoundError: .*nothere"),
    ("def get_config(): return 1 / 0", "ZeroDivisionError"),
    ("def get_config(): return int('x')", "'x'"),
    ("def get_config(): pass", "NoneType"),
    ("def get_config(:", "SyntaxError"),
  ],
)
def test_errors_of_config_file_name_it(tmp_path, text, wrong):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(ValueError, match=f"^--config={tmp_path}/mine.py: .*{wrong}"):
    config_lib.load(f"{tmp_path}/mine.py")


def test_override_of_list_item_raises():
  with pytest.raises(ValueError, match=r"transforms\.0\.size: transforms is no section"):
    config_lib.load("configs/vit.py", ["--config.data.train.transforms.0.size=20"])


@pytest.mark.parametrize("specs", [3, [3], ["resize"], [{"size": 3}], [[1, 2]]])
def test_transforms_that_are_no_dicts_raise(specs):
  with pytest.raises(ValueError, match=r"^(unknown )?transform"):
    build_transforms(specs)


@pytest.mark.parametrize("size", ["big", 0, (16, -3), (1, 2, 3), ()])
def test_transform_sizes_that_are_not_positive_raise(size):
  with pytest.raises(ValueError, match=r"^transform 'resize': size is "):
    build_transforms([{"name": "resize", "size": size}])


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("random_flip", "probability", 3),
    ("resize_shorter", "shorter", ()),
    ("resize_shorter", "longest", 0),
    ("random_scale_crop", "crop_sides", (600, 300)),
    ("resize", "size", 100_000),
  ],
)
def test_transform_field_out_of_range(name, field, value):
  with pytest.raises(ValueError, match=rf"{name}.*: {field} is .*; expected "):
    build_transforms([{"name": name, field: value}])


def test_empty_message_and_memory_error(capsys):
  with pytest.raises(SystemExit), cli.one_line_errors(show_traceback=False):
    raise MemoryError
  assert capsys.readouterr().err == "error: MemoryError\n"


@pytest.mark.parametrize(
  ("field", "value"),
  [("weight_decay", "abc"), ("clip_norm", [1]), ("b1", "x"), ("learning_rate", {}), ("rules", [1])],
)
def test_optimizer_values_of_wrong_type_name_field(field, value):
  fields = {"name": "adamw", "learning_rate": 1.0, field: value}
  with pytest.raises(ValueError, match=rf"^optimizer.{field.removesuffix('s')}.*(expected|pair)"):
    create_optimizer(fields, {"w": np.zeros((2, 2))}, 5)


@pytest.mark.parametrize("rule", ["abc", 3, (".*", 3), ("(", "fsdp"), (".*", "rows"), (".*", "no")])
def test_wrong_sharding_rules_name_field(rule):
  with pytest.raises(ValueError, match=r"sharding.rule"):
    sharding.parameter_specs({"w": np.zeros((2, 2))}, [rule], sharding.create_mesh({"data": -1}))


def test_file_error_names_flag(tmp_path, monkeypatch, capsys):
  values = flags.FlagValues()
  flags.DEFINE_string("output", None, "", flag_values=values)
  values(["", f"--output={tmp_path}/nowhere"])
  monkeypatch.setattr(cli.flags, "FLAGS", values)
  for file in ("nowhere", "nowhere/a.npz", "other"):
    with pytest.raises(SystemExit), cli.one_line_errors(show_traceback=False):
      (tmp_path / file).read_text()
  first, second, third = capsys.readouterr().err.splitlines()
  assert first.startswith("error: --output: ")
  assert second.startswith("error: --output: ")
  assert "--output" not in third
