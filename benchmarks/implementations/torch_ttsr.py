"""TTSR's search and transfer as the official code does them, written plainly in torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from implementations import torch_utils
from implementations.base import Setting, Side


def search(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """Unfolds all patches, multiplies all with all, and takes the maximum over the references.

  Args:
    queries: [b c h w].
    references: [b c i j].

  Returns:
    The maxima [b h*w] and their places among the references.
  """
  asked, known = (F.normalize(F.unfold(x, 3, padding=1), dim=1) for x in (queries, references))
  return torch.bmm(known.transpose(1, 2), asked).max(dim=1)


def transfer(reference: torch.Tensor, index: torch.Tensor, scale: int, size: list) -> torch.Tensor:
  """Unfolds the reference's patches, gathers the chosen ones and folds them.

  Args:
    reference: [b c i*scale j*scale].
    index: as `search` returns it.
    scale: of the level.
    size: height and width of the map that asked.
  """
  patches = F.unfold(reference, 3 * scale, padding=scale, stride=scale)
  chosen = patches.gather(2, index[:, None].expand(-1, patches.shape[1], -1))
  whole = (size[0] * scale, size[1] * scale)
  return F.fold(chosen, whole, 3 * scale, padding=scale, stride=scale) / 9


def side(setting: Setting) -> Side:
  """Searches, and transfers three levels; once more with gradients for all maps."""
  given = setting.inputs()
  maps = [torch_utils.placed(x.transpose(0, 3, 1, 2)) for x in given.values()]
  size = list(maps[0].shape[2:])

  def whole(queries: torch.Tensor, references: torch.Tensor, *levels: torch.Tensor) -> tuple:
    relevance, index = search(queries, references)
    scales = (1, 2, 4)
    textures = [transfer(x, index, s, size) for x, s in zip(levels, scales, strict=True)]
    return index, relevance, *textures

  def make(form: str) -> dict[str, Callable[[int], None]]:
    run = torch_utils.maybe_compiled(whole, form)

    @torch.inference_mode()
    def forward() -> None:
      run(*maps)

    def gradient() -> None:
      asked = [x.detach().requires_grad_() for x in maps]
      sum(x.sum() for x in run(*asked)[1:]).backward()

    return {
      "search": torch_utils.repeated(forward),
      "search and gradient": torch_utils.repeated(gradient),
    }

  with torch.no_grad():
    index, relevance, *textures = whole(*maps)
  grid = (len(relevance), *size)
  answers = {"relevance": relevance.view(grid), "index": index.view(grid)}
  answers |= {
    f"texture {s}": x.permute(0, 2, 3, 1) for s, x in zip((1, 2, 4), textures, strict=True)
  }
  runs, skipped = torch_utils.tried(setting, make)
  return Side(runs, torch_utils.numpy(answers), torch_utils.described(), skipped)
