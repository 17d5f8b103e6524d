"""TTSR's texture search and transfer as in the official code, in PyTorch."""

from collections.abc import Callable, Sequence

import numpy as np
import timing
import torch
import torch.nn.functional as F

from implementations import torch_utils
from implementations.base import Implementation, Setting

SCALES = (1, 2, 4)


def search(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns the maximal similarities [b h*w] of queries [b c h w], and their reference positions.

  Uses the full similarity matrix of all patches; `references` are [b c i j].
  """
  left, right = (F.normalize(F.unfold(x, 3, padding=1), dim=1) for x in (references, queries))
  return torch.bmm(left.transpose(1, 2), right).max(dim=1)


def transfer(reference: torch.Tensor, index: torch.Tensor, scale: int, size: list) -> torch.Tensor:
  """Gathers the best patches of a reference [b c i*scale j*scale] and folds them.

  `index` are the positions from `search`, `size` height and width of the query map.
  """
  patches = F.unfold(reference, 3 * scale, padding=scale, stride=scale)
  chosen = patches.gather(2, index[:, None].expand(-1, patches.shape[1], -1))
  whole = (size[0] * scale, size[1] * scale)
  return F.fold(chosen, whole, 3 * scale, padding=scale, stride=scale) / 9


def search_and_transfer(
  queries: torch.Tensor, references: torch.Tensor, *levels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
  """Returns index, relevance and the transferred textures of up to three levels."""
  relevance, index = search(queries, references)
  size = list(queries.shape[2:])
  textures = [transfer(x, index, s, size) for x, s in zip(levels, SCALES, strict=False)]
  return index, relevance, *textures


def channels_first(maps: Sequence[np.ndarray]) -> list[torch.Tensor]:
  """Returns maps [b h w c] as tensors [b c h w] on the device."""
  return [torch_utils.to_device(x.transpose(0, 3, 1, 2)) for x in maps]


@torch.inference_mode()
def measure(maps: Sequence[np.ndarray], rounds: int) -> tuple[float, list[float]]:
  """Returns the growth of peak memory in GB in a warm-up run, and the seconds of each round."""
  tensors = channels_first(maps)
  run = torch_utils.repeated(lambda: search_and_transfer(*tensors))
  before = timing.resident_gb()
  run(1)
  grown = timing.resident_gb() - before
  return grown, timing.time_rounds(run, rounds)


def create(setting: Setting) -> Implementation:
  """Search and transfer of three levels, and the same with gradients for all maps."""
  maps = channels_first(list(setting.inputs().values()))

  def make(mode: str) -> dict[str, Callable[[int], None]]:
    run = torch_utils.maybe_compiled(search_and_transfer, mode)

    @torch.inference_mode()
    def forward() -> None:
      run(*maps)

    def gradient() -> None:
      leaves = [x.detach().requires_grad_() for x in maps]
      sum(x.sum() for x in run(*leaves)[1:]).backward()

    return {
      "search": torch_utils.repeated(forward),
      "search and gradient": torch_utils.repeated(gradient),
    }

  with torch.no_grad():
    index, relevance, *textures = search_and_transfer(*maps)
  grid = (len(relevance), *maps[0].shape[2:])
  outputs = {"relevance": relevance.view(grid), "index": index.view(grid)}
  outputs |= {f"texture {s}": x.permute(0, 2, 3, 1) for s, x in zip(SCALES, textures, strict=True)}
  runs, skipped = torch_utils.prepare_modes(setting, make)
  return Implementation(runs, torch_utils.numpy(outputs), torch_utils.device_name(), skipped)
