"""Shared by the peers in PyTorch: device, precision, torch.compile, train step."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from implementations.base import Setting

CHANNELS_LAST = ", channels last"


def device() -> torch.device:
  """Returns the GPU if there is one, with TF32 and cuDNN's autotuner, else the CPU."""
  if not torch.cuda.is_available():
    return torch.device("cpu")
  torch.set_float32_matmul_precision("high")
  torch.backends.cudnn.benchmark = True
  return torch.device("cuda")


def device_name() -> str:
  """Returns the name of the GPU, or the CPU's architecture and number of threads."""
  if torch.cuda.is_available():
    return torch.cuda.get_device_name()
  return f"{platform.machine()}, {torch.get_num_threads()} threads"


def to_device(array: np.ndarray) -> torch.Tensor:
  """Returns an array as a tensor on the device."""
  return torch.from_numpy(np.ascontiguousarray(array)).to(device())


def numpy(outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
  """Returns tensors as float32 arrays."""
  return {name: x.detach().float().cpu().numpy() for name, x in outputs.items()}


def precision(setting: Setting) -> Any:
  """Returns the autocast context of a forward pass, enabled for bfloat16."""
  return torch.autocast(device().type, torch.bfloat16, enabled=setting.dtype == "bfloat16")


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
  """Returns a function that calls `call` n times and waits for the device."""

  def run(count: int) -> None:
    for _ in range(count):
      call()
    if torch.cuda.is_available():
      torch.cuda.synchronize()

  return run


def train_step(
  model: torch.nn.Module,
  loss: Callable[[], torch.Tensor],
  *,
  weight_decay: float = 0.1,
  clip_norm: float = 1.0,
) -> Callable[[int], None]:
  """Returns a function that takes n steps of fused AdamW with clipped gradients."""
  params = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=weight_decay, fused=True)

  def step() -> None:
    model.train()
    loss().backward()
    torch.nn.utils.clip_grad_norm_(params, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  return repeated(step)


def prepare_modes(
  setting: Setting,
  make: Callable[[str], Mapping[str, Callable[[int], None]]],
  modes: tuple[str, ...] = (),
) -> tuple[dict[str, Callable[[int], None]], dict[str, str]]:
  """Runs each job once in every mode; returns runs by "job, mode", and errors of those that fail.

  `make` returns runs by job for a mode; `modes` replaces the setting's.
  """
  runs, skipped = {}, {}
  for mode in modes or setting.modes:
    try:
      made = make(mode)
    except Exception as error:
      skipped[mode] = _first_line(error)
      continue
    for job, run in made.items():
      start = time.perf_counter()
      try:
        run(1)
      except Exception as error:
        skipped[f"{job}, {mode}"] = _first_line(error)
        continue
      print(f"ready: {job}, {mode} ({time.perf_counter() - start:.0f} s)", flush=True)
      runs[f"{job}, {mode}"] = run
  return runs, skipped


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [repr(error)])[0][:200]


def maybe_compiled(model: Any, mode: str) -> Any:
  """Returns the model or function, through torch.compile in compiled modes."""
  return torch.compile(model) if mode.startswith("compiled") else model
