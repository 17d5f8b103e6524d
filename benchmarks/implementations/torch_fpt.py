"""The feature pyramid transformer of the official code, in PyTorch.

Parameters are named as in the released state dicts; unused parameters are omitted. Without lateral
convolutions and without norms after the output convolutions.
"""

import math
from collections.abc import Callable, Sequence

import timing
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from implementations import torch_utils
from implementations.base import Implementation, Setting

LEVELS = (2, 3, 4, 5)
STRIDES = (4, 8, 16, 32)
PARTS = 2


class SelfTransformer(nn.Module):
  """Mixture of two softmaxes over pooled keys, with a residual."""

  def __init__(self, width: int):
    super().__init__()
    self.conv_qs, self.conv_vs = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
    self.conv = nn.Conv2d(width, width, 1, bias=False)
    self.norm_layer = nn.BatchNorm2d(width)
    self.attention = nn.Linear(width, PARTS, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns [b c h w]."""
    batch, width, height, breadth = x.shape
    pooled = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    query = self.conv_qs(x).flatten(2)
    key, value = self.conv_qs(pooled).flatten(2), self.conv_vs(pooled).flatten(2)
    mixture = torch.softmax(self.attention(query.mean(2)), dim=-1)
    heads = (batch * PARTS, width // PARTS, -1)
    scores = torch.bmm(query.reshape(heads).transpose(1, 2), key.reshape(heads)) / width**0.5
    weights = scores.softmax(-1).view(batch, PARTS, *scores.shape[1:])
    weights = (weights * mixture[..., None, None]).sum(1)
    gathered = torch.bmm(weights, value.transpose(1, 2)).transpose(1, 2)
    return self.norm_layer(self.conv(gathered.reshape(batch, width, height, breadth))) + x


class GroundingTransformer(nn.Module):
  """Attention to a coarser level by dot products, divided by the number of its positions."""

  def __init__(self, width: int):
    super().__init__()
    self.theta, self.phi, self.g = (nn.Conv2d(width, width // 2, 1) for _ in range(3))
    self.W_z = nn.Sequential(nn.Conv2d(width // 2, width, 1), nn.BatchNorm2d(width))

  def forward(self, x: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Returns [b c h w] at the finer level's size."""
    query = self.theta(x).flatten(2).transpose(1, 2)
    key, value = self.phi(coarse).flatten(2), self.g(coarse).flatten(2).transpose(1, 2)
    gathered = torch.bmm(torch.bmm(query, key) / key.shape[-1], value)
    grid = (len(x), -1, *x.shape[2:])
    return self.W_z(gathered.transpose(1, 2).reshape(grid))


class RenderingTransformer(nn.Module):
  """A level gated by the mean of a finer one, plus the downsampled finer level."""

  def __init__(self, width: int):
    super().__init__()
    self.conv3x3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    self.str_conv3x3 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
    self.conv1x1 = nn.Conv2d(width, width, 1, bias=False)
    self.bn_high, self.bn_low, self.bn_reduction = (nn.BatchNorm2d(width) for _ in range(3))

  def forward(self, x: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Returns [b c h w] at the coarser level's size."""
    gate = F.relu(self.bn_low(self.conv1x1(fine.mean((2, 3), keepdim=True))))
    gated = self.bn_high(self.conv3x3(x)) * gate
    for _ in range(int(math.log2(fine.shape[-1] // x.shape[-1]))):
      fine = self.str_conv3x3(fine)
    return F.relu(self.bn_reduction(fine) + gated)


class TorchFpt(nn.Module):
  """Transformers between all pairs of levels, and a 3x3 output convolution per level."""

  def __init__(self, width: int):
    super().__init__()
    for own in LEVELS:
      self.add_module(f"st_p{own}", SelfTransformer(width))
      for other in LEVELS:
        kind = GroundingTransformer if other > own else RenderingTransformer
        if other != own:
          prefix = "gt" if other > own else "rt"
          self.add_module(f"{prefix}_p{own}_p{other}", kind(width))
      self.add_module(f"fpt_p{own}", nn.Conv2d(5 * width, width, 3, padding=1))

  def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns a map per level, from fine to coarse."""
    maps = dict(zip(LEVELS, levels, strict=True))
    results = []
    for own, x in maps.items():
      features = [self.get_submodule(f"st_p{own}")(x)]
      finer = [i for i in reversed(LEVELS) if i < own]
      features += [self.get_submodule(f"rt_p{own}_p{i}")(x, maps[i]) for i in finer]
      coarser = [i for i in LEVELS if i > own]
      features += [self.get_submodule(f"gt_p{own}_p{i}")(x, maps[i]) for i in coarser]
      results.append(self.get_submodule(f"fpt_p{own}")(torch.cat([*features, x], dim=1)))
    return results


def measure(image_size: int, width: int, rounds: int) -> tuple[float, list[float], list[float]]:
  """Returns the growth of peak memory in GB, and the seconds forward and with gradients."""
  torch.manual_seed(0)
  model = TorchFpt(width).eval()  # running statistics, as measured in JAX
  levels = [torch.randn(1, width, image_size // s, image_size // s) for s in STRIDES]
  before = timing.resident_gb()

  @torch.inference_mode()
  def forward() -> None:
    model(levels)

  def backward() -> None:
    sum(x.sum() for x in model(levels)).backward()

  times = [timing.time_rounds(torch_utils.repeated(run), rounds) for run in (forward, backward)]
  return timing.resident_gb() - before, times[0], times[1]


def create(setting: Setting) -> Implementation:
  """The pyramid, and the gradients for parameters and maps."""
  levels = [torch_utils.to_device(x.transpose(0, 3, 1, 2)) for x in setting.inputs().values()]

  def make(mode: str) -> dict[str, Callable[[int], None]]:
    plain = _load(setting)
    maps = levels
    if mode.endswith(torch_utils.CHANNELS_LAST):
      plain = plain.to(memory_format=torch.channels_last)
      maps = [x.to(memory_format=torch.channels_last) for x in levels]
    model = torch_utils.maybe_compiled(plain, mode)

    @torch.inference_mode()
    def forward() -> None:
      plain.eval()
      with torch_utils.precision(setting):
        model(maps)

    def gradient() -> None:
      plain.train()
      leaves = [x.detach().requires_grad_() for x in maps]
      with torch_utils.precision(setting):
        results = model(leaves)
      sum((x.float() ** 2).sum() for x in results).backward()
      plain.zero_grad(set_to_none=True)

    return {
      "forward": torch_utils.repeated(forward),
      "forward and backward": torch_utils.repeated(gradient),
    }

  with torch.no_grad():
    results = _load(setting).eval()(levels)
  outputs = {f"p{i}": x.permute(0, 2, 3, 1) for i, x in zip(LEVELS, results, strict=True)}
  modes = tuple(m + last for m in setting.modes for last in ("", torch_utils.CHANNELS_LAST))
  runs, skipped = torch_utils.prepare_modes(setting, make, modes)
  return Implementation(runs, torch_utils.numpy(outputs), torch_utils.device_name(), skipped)


def _load(setting: Setting) -> TorchFpt:
  state = load_file(f"{setting.weights}.safetensors")
  model = TorchFpt(len(state["fpt_p2.weight"]))
  missing = model.load_state_dict(state, strict=False).missing_keys
  if missing:
    raise ValueError(f"{setting.weights}.safetensors: missing {', '.join(missing[:3])}")
  return model.to(torch_utils.device())
