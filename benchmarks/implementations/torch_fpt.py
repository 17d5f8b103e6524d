"""The feature pyramid transformer of the released code, written plainly in torch.

Names of parameters are those of the released state dicts; what the code makes and never uses is
left out. Without lateral convolutions and without norms after the joins, as compared here.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from implementations import torch_utils
from implementations.base import Setting, Side

LEVELS = (2, 3, 4, 5)
PARTS = 2


class SelfTransformer(nn.Module):
  """Mixture of two softmaxes over pooled keys; residual."""

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
    shares = torch.softmax(self.attention(query.mean(2)), dim=-1)
    heads = (batch * PARTS, width // PARTS, -1)
    scores = torch.bmm(query.reshape(heads).transpose(1, 2), key.reshape(heads)) / width**0.5
    weights = scores.softmax(-1).view(batch, PARTS, *scores.shape[1:])
    weights = (weights * shares[..., None, None]).sum(1)
    gathered = torch.bmm(weights, value.transpose(1, 2)).transpose(1, 2)
    return self.norm_layer(self.conv(gathered.reshape(batch, width, height, breadth))) + x


class GroundingTransformer(nn.Module):
  """Dot products with a coarser level, over the number of its positions."""

  def __init__(self, width: int):
    super().__init__()
    self.theta, self.phi, self.g = (nn.Conv2d(width, width // 2, 1) for _ in range(3))
    self.W_z = nn.Sequential(nn.Conv2d(width // 2, width, 1), nn.BatchNorm2d(width))

  def forward(self, x: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Returns [b c h w] of the finer level."""
    query = self.theta(x).flatten(2).transpose(1, 2)
    key, value = self.phi(coarse).flatten(2), self.g(coarse).flatten(2).transpose(1, 2)
    gathered = torch.bmm(torch.bmm(query, key) / key.shape[-1], value)
    grid = (len(x), -1, *x.shape[2:])
    return self.W_z(gathered.transpose(1, 2).reshape(grid))


class RenderingTransformer(nn.Module):
  """A level gated by the mean of a finer one, which is made smaller and added."""

  def __init__(self, width: int):
    super().__init__()
    self.conv3x3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    self.str_conv3x3 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
    self.conv1x1 = nn.Conv2d(width, width, 1, bias=False)
    self.bn_high, self.bn_low, self.bn_reduction = (nn.BatchNorm2d(width) for _ in range(3))

  def forward(self, x: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Returns [b c h w] of the coarser level."""
    gate = F.relu(self.bn_low(self.conv1x1(fine.mean((2, 3), keepdim=True))))
    gated = self.bn_high(self.conv3x3(x)) * gate
    for _ in range(int(math.log2(fine.shape[-1] // x.shape[-1]))):
      fine = self.str_conv3x3(fine)
    return F.relu(self.bn_reduction(fine) + gated)


class PlainFpt(nn.Module):
  """All pairs of levels, joined by a 3x3 convolution each."""

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
    """Returns a map for each level, from fine to coarse."""
    maps = dict(zip(LEVELS, levels, strict=True))
    results = []
    for own, x in maps.items():
      seen = [self.get_submodule(f"st_p{own}")(x)]
      finer = [i for i in reversed(LEVELS) if i < own]
      seen += [self.get_submodule(f"rt_p{own}_p{i}")(x, maps[i]) for i in finer]
      coarser = [i for i in LEVELS if i > own]
      seen += [self.get_submodule(f"gt_p{own}_p{i}")(x, maps[i]) for i in coarser]
      results.append(self.get_submodule(f"fpt_p{own}")(torch.cat([*seen, x], dim=1)))
    return results


def side(setting: Setting) -> Side:
  """Computes the pyramid, and the gradients for parameters and maps."""
  levels = [torch_utils.placed(x.transpose(0, 3, 1, 2)) for x in setting.inputs().values()]

  def make(form: str) -> dict[str, Callable[[int], None]]:
    plain = _load(setting)
    maps = levels
    if form.endswith(torch_utils.CHANNELS_LAST):
      plain = plain.to(memory_format=torch.channels_last)
      maps = [x.to(memory_format=torch.channels_last) for x in levels]
    model = torch_utils.maybe_compiled(plain, form)

    @torch.inference_mode()
    def forward() -> None:
      plain.eval()
      with torch_utils.precision(setting):
        model(maps)

    def gradient() -> None:
      plain.train()
      asked = [x.detach().requires_grad_() for x in maps]
      with torch_utils.precision(setting):
        results = model(asked)
      sum((x.float() ** 2).sum() for x in results).backward()
      plain.zero_grad(set_to_none=True)

    return {
      "forward": torch_utils.repeated(forward),
      "forward and backward": torch_utils.repeated(gradient),
    }

  with torch.no_grad():
    found = _load(setting).eval()(levels)
  answers = {f"p{i}": x.permute(0, 2, 3, 1) for i, x in zip(LEVELS, found, strict=True)}
  forms = tuple(f + last for f in setting.forms for last in ("", torch_utils.CHANNELS_LAST))
  runs, skipped = torch_utils.tried(setting, make, forms)
  return Side(runs, torch_utils.numpy(answers), torch_utils.described(), skipped)


def _load(setting: Setting) -> PlainFpt:
  state = load_file(f"{setting.weights}.safetensors")
  model = PlainFpt(len(state["fpt_p2.weight"]))
  missing = model.load_state_dict(state, strict=False).missing_keys
  if missing:
    raise ValueError(f"the exported FPT lacks {', '.join(missing[:3])}")
  return model.to(torch_utils.device())
