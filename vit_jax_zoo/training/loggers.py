"""Logging services beside TensorBoard, of `config.logging`; see docs/guides/data.md."""

import importlib.util
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from vit_jax_zoo.errors import check_names, one_line
from vit_jax_zoo.training import disk

PROJECT = "vit_jax_zoo"  # default name of the project, or experiment
RUN_IDS = "logging.json"  # of the services' runs, which a resumed run continues


class Service(NamedTuple):
  """A run at a service: its id there, and functions that write to it and end it."""

  run_id: str
  scalars: Callable[[int, dict[str, float]], object]  # step, values by name
  image: Callable[[int, str, np.ndarray], object]  # step, name, uint8 [h w 3]
  hparams: Callable[[dict[str, Any]], object]
  close: Callable[[int], object]  # exit status, 0 unless the run failed


def _wandb(wandb: Any, folder: str, name: str, run_id: str | None) -> Service:
  options = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "name": name, "id": run_id}
  run = wandb.init(dir=folder, resume="allow", settings=wandb.Settings(console="off"), **options)
  run.define_metric("*", step_metric="step")  # W&B's own step cannot go back, as in a resumed run
  return Service(
    run.id,
    scalars=lambda step, values: run.log({"step": step, **values}),
    image=lambda step, key, pixels: run.log({"step": step, key: wandb.Image(pixels)}),
    hparams=lambda values: run.config.update(values, allow_val_change=True),
    close=run.finish,
  )


def _mlflow(mlflow: Any, _: str, name: str, run_id: str | None) -> Service:
  client = mlflow.MlflowClient()
  if run_id is None:
    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    run_id = client.create_run(experiment.experiment_id, run_name=name).info.run_id
  client.update_run(run_id, "RUNNING")

  def valid(key: str) -> str:
    return re.sub(r"[^\w. :/-]", "_", key)

  def scalars(step: int, values: dict[str, float]) -> None:
    make, now = mlflow.entities.Metric, int(1000 * time.time())
    client.log_batch(run_id, [make(valid(key), x, now, step) for key, x in values.items()])

  def hparams(values: dict[str, Any]) -> None:
    make = mlflow.entities.Param
    client.log_batch(run_id, params=[make(valid(k), str(x)[:500]) for k, x in values.items()])

  def image(step: int, key: str, pixels: np.ndarray) -> None:
    client.log_image(run_id, pixels, key=valid(key), step=step)

  def close(status: int) -> None:
    client.set_terminated(run_id, "FAILED" if status else "FINISHED")

  return Service(run_id, scalars, image, hparams, close)


def _comet(comet_ml: Any, folder: str, name: str, run_id: str | None) -> Service:
  unused = ("log_code", "log_graph", "log_git_metadata", "log_git_patch", "auto_output_logging")
  options = {"name": name, "offline_directory": folder, **dict.fromkeys(unused, False)}
  run = comet_ml.start(
    project_name=os.environ.get("COMET_PROJECT_NAME", PROJECT),
    experiment_key=run_id or uuid.uuid4().hex,
    experiment_config=comet_ml.ExperimentConfig(**options),
  )
  return Service(
    run.get_key(),
    scalars=lambda step, values: run.log_metrics(values, step=step),
    image=lambda step, key, pixels: run.log_image(pixels, name=key, step=step),
    hparams=run.log_parameters,
    close=lambda _: run.end(),
  )


SERVICES = {
  "wandb": ("wandb", _wandb), "mlflow": ("mlflow", _mlflow), "comet": ("comet_ml", _comet),
}  # fmt: skip
"""By name, which is that of the extra: the package, and the function that opens a run."""


def check_loggers(names: Iterable[str]) -> None:
  """Raises ValueError for an unknown logger, ModuleNotFoundError for a package not installed."""
  check_names("logger of config.logging", names, ("tensorboard", *SERVICES))
  for name in SERVICES.keys() & set(names):
    if importlib.util.find_spec(SERVICES[name][0]) is None:
      install = f"pip install -e '.[{name}]'"
      raise ModuleNotFoundError(f"config.logging: {name} is not installed; {install}")


def open_services(
  names: Iterable[str], workdir: epath.Path, folder: str, *, resume: bool
) -> dict[str, Service]:
  """Opens services by name, with offline files in `folder`; ValueError if one cannot be opened."""
  file, services = workdir / RUN_IDS, {}
  ids = (disk.read_json(file, "; remove it to log to new runs") if resume else None) or {}
  for name, (package, open_run) in SERVICES.items():
    if name in names:
      try:
        module = importlib.import_module(package)
        services[name] = open_run(module, folder, workdir.name, ids.get(name))
      except Exception as error:
        raise ValueError(f"config.logging: {name}: {one_line(str(error))}") from error
  if services:
    disk.write_json(file, ids | {name: s.run_id for name, s in services.items()})
  return services
