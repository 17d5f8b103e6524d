"""Trains and evaluates a config.

    python -m vit_jax_zoo.main --config=configs/vit.py
    python -m vit_jax_zoo.main --config=configs/vit.py:s16_imagenet --workdir=gs://bucket/run
    python -m vit_jax_zoo.main --config=configs/vit.py --config.optimizer.learning_rate=3e-4

The same command again resumes the run; a finished run is only re-evaluated.
"""

import hashlib
import pathlib
import shutil
from collections.abc import Sequence

from absl import flags, logging
from etils import epath

from vit_jax_zoo import cli, trainer
from vit_jax_zoo.config import load
from vit_jax_zoo.training import distributed
from vit_jax_zoo.training.loop import Outcome, format_scores, score_table

CONFIG = flags.DEFINE_string(
  "config",
  None,
  "a config's file or name[:variant][,field=value...]; --config.section.field=value sets any field",
)
WORKDIR = flags.DEFINE_string("workdir", None, "output folder; default: runs/<config>_<variant>")
EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "evaluate the last checkpoint, or init_from")
OVERFIT = flags.DEFINE_bool("overfit_one_batch", False, "train on one batch, to check the model")
PROFILE = flags.DEFINE_string("profile", None, "steps to trace, first:last, such as 10:15")
ALLOW_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "resume although the config differs from the run's"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "number of processes of the run")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "index of this process, from 0")
RENAMED_FLAGS = {"evaluate_only": "eval_only"}

_MAX_LENGTH = 120  # of the config's argument in the name of a run's directory

EXIT_STOPPED = 143  # 128 + SIGTERM: the run was interrupted, and its state is saved


def main(argv: Sequence[str]) -> int:
  """Runs the command with overrides of config fields; returns the exit status."""
  if CONFIG.value is None:
    raise ValueError("--config is missing; try --config=configs/vit.py")
  config = load(CONFIG.value, argv[1:])
  distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  if not distributed.is_primary():
    logging.set_verbosity(logging.WARNING)
  workdir = epath.Path(WORKDIR.value or default_workdir(CONFIG.value))
  options = trainer.RunOptions(
    eval_only=EVAL_ONLY.value,
    overfit_one_batch=OVERFIT.value,
    profile=parse_window(PROFILE.value),
    allow_config_change=ALLOW_CHANGE.value,
  )
  outcome = trainer.run(config, workdir, options)
  if distributed.is_primary():
    _log_outcome(outcome)
  return 0 if outcome.finished else EXIT_STOPPED


def default_workdir(config_argument: str) -> str:
  """Returns runs/<config>_<variant and fields> of the value of --config.

  >>> default_workdir("configs/vit.py:b16_imagenet,image_size=384")
  'runs/vit_b16_imagenet_image_size_384'
  >>> default_workdir("configs/vit.py")
  'runs/vit_demo'
  """
  path, _, argument = config_argument.partition(":")
  name = "".join(c if c.isalnum() or c in "._-" else "_" for c in argument or "demo")
  if len(name) > _MAX_LENGTH:  # file names are limited, and fields may be paths
    name = f"{name[:_MAX_LENGTH]}_{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
  return f"runs/{pathlib.Path(path).stem}_{name}"


def parse_window(text: str | None) -> tuple[int, int] | None:
  """Parses "first:last", a half-open window of steps: two increasing positive integers."""
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
    raise ValueError(f"--profile={text}: expected first:last, such as 10:15")
  return int(first), int(last)


def _log_outcome(outcome: Outcome) -> None:
  step = int(outcome.state.step)
  workdir = epath.Path(str(outcome.workdir).removeprefix(f"{pathlib.Path.cwd()}/"))
  if outcome.finished:
    scores = format_scores(outcome.scores) or "(the config has no evaluation)"
    logging.info("done after %d steps: %s", step, scores)
    for line in score_table(outcome.scores):
      logging.info("  %s", line)
  else:
    logging.info("stopped by a signal after step %d; run the same command to resume", step)
  for output in ("checkpoints", "metrics.jsonl", "figures"):
    if (workdir / output).exists():
      logging.info("  %-12s %s", output.partition(".")[0], workdir / output)
  if next(workdir.glob("events.out.tfevents.*"), None):
    program = "tensorboard" if shutil.which("tensorboard") else "python -m tensorboard.main"
    logging.info("  %-12s %s --logdir=%s", "TensorBoard", program, workdir)
  if outcome.finished:
    command = "python -m vit_jax_zoo predict --model=%s --images=photo.jpg"
    logging.info(f"  %-12s {command}", "predict", workdir)


if __name__ == "__main__":
  cli.run(main, renamed=RENAMED_FLAGS)
