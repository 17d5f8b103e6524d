"""Published ImageGPT checkpoints by name, and the scores that the paper reports."""

from vit_jax_zoo.weights.model_index import Entry

OPENAI = "https://openaipublic.blob.core.windows.net/image-gpt"
_PAPER = "Chen et al., ICML 2020"


def _igpt(size: str, shards: int, nats: str, long: str) -> dict[str, Entry]:
  prefix = f"{OPENAI}/checkpoints/igpt-{size}/1000000/model.ckpt-1000000"
  data = (f"{prefix}.data-{i:05d}-of-{shards:05d}" for i in range(shards))
  urls = (f"{prefix}.index", *data, f"{OPENAI}/color-clusters/kmeans_centers.npy")
  score = f"{nats} nats a pixel (ImageNet, 32x32)"
  reported = {"score": score, "source": "openai/image-gpt, README"}
  return {
    f"igpt_{size}_imagenet": Entry(f"igpt_{size}", urls, **reported),
    f"igpt_{size}_imagenet_hub": Entry(f"igpt_{size}", hub=f"openai/imagegpt-{long}", **reported),
  }


PUBLISHED: dict[str, Entry] = {
  **_igpt("s", 32, "2.0895", "small"),
  **_igpt("m", 32, "2.0614", "medium"),
  **_igpt("l", 64, "2.0466", "large"),
}

PAPER_SCORES: dict[str, tuple[str, str]] = {
  "igpt_s": ("41.9 %, linear probe at 32", _PAPER),
  "igpt_m": ("54.5 %, linear probe at 32", _PAPER),
  "igpt_l": ("65.2 %, linear probe at 48", _PAPER),
  "igpt_xl": ("72.0 %, linear probe of five layers at 64", _PAPER),
}
