"""What the peers in torch share: device, precision, torch.compile, the training step."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from implementations.base import Setting

CHANNELS_LAST = ", channels last"


def device() -> torch.device:
  """Returns the GPU where there is one; lets float32 products use its fast units, as JAX does."""
  if not torch.cuda.is_available():
    return torch.device("cpu")
  torch.set_float32_matmul_precision("high")
  torch.backends.cudnn.benchmark = True
  return torch.device("cuda")


def described() -> str:
  """Returns what torch computes on, in words."""
  if torch.cuda.is_available():
    return torch.cuda.get_device_name()
  return f"{platform.machine()}, {torch.get_num_threads()} threads"


def placed(array: np.ndarray) -> torch.Tensor:
  """Returns an array on the device."""
  return torch.from_numpy(np.ascontiguousarray(array)).to(device())


def numpy(answers: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
  """Returns answers as the driver compares them."""
  return {name: x.detach().float().cpu().numpy() for name, x in answers.items()}


def precision(setting: Setting) -> Any:
  """Returns the context of a forward pass: mixed precision by autocast for bfloat16."""
  return torch.autocast(device().type, torch.bfloat16, enabled=setting.dtype == "bfloat16")


def wait() -> None:
  """Waits until the device has done all that it was told."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
  """Returns what makes the call so many times, and waits for the last."""

  def run(count: int) -> None:
    for _ in range(count):
      call()
    wait()

  return run


def train_step(
  model: torch.nn.Module,
  loss: Callable[[], torch.Tensor],
  *,
  weight_decay: float = 0.1,
  clip_norm: float = 1.0,
) -> Callable[[int], None]:
  """Returns so many steps of fused AdamW with clipped gradients."""
  params = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=weight_decay, fused=True)

  def step() -> None:
    model.train()
    loss().backward()
    torch.nn.utils.clip_grad_norm_(params, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  return repeated(step)


def tried(
  setting: Setting,
  make: Callable[[str], Mapping[str, Callable[[int], None]]],
  forms: tuple[str, ...] = (),
) -> tuple[dict[str, Callable[[int], None]], dict[str, str]]:
  """Sets the peer up in every form, and runs each once: torch.compile fails in many ways.

  Args:
    setting: names the forms.
    make: takes the form's name, and returns runs.
    forms: in place of the setting's.

  Returns:
    The runs, by "job, form", and what went wrong with others.
  """
  runs, skipped = {}, {}
  for form in forms or setting.forms:
    try:
      made = make(form)
    except Exception as error:
      skipped[form] = _reason(error)
      continue
    for job, run in made.items():
      start = time.perf_counter()
      try:
        run(1)
      except Exception as error:
        skipped[f"{job}, {form}"] = _reason(error)
        continue
      print(f"ready: {job}, {form} ({time.perf_counter() - start:.0f} s)", flush=True)
      runs[f"{job}, {form}"] = run
  return runs, skipped


def _reason(error: Exception) -> str:
  return (str(error).strip().splitlines() or [repr(error)])[0][:200]


def maybe_compiled(model: Any, form: str) -> Any:
  """Returns the model or function through torch.compile where the form says so."""
  return torch.compile(model) if form.startswith("compiled") else model
