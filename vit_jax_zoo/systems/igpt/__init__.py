"""iGPT, "Generative Pretraining from Pixels", ICML 2020."""

from vit_jax_zoo.registry import Format, Option, System

SYSTEM = System(
  models={"igpt": "model:ImageGPT"},
  other_names=((r"imagegpt_([sml])[a-z]+$", r"igpt_\1"),),
  tasks={"pixel_modelling": "task:PixelModelling"},
  predictors={"pixel_modelling": "predictor:CompletionPredictor"},
  options=(
    Option("prefix_fraction", float, 0.5, "fraction of the rows as prompt", old_name="keep"),
    Option("samples", int, 6, "completions per image"),
    Option("temperature", float, 1.0, "sampling temperature of completions"),
  ),
  formats=(
    Format("hf", "igpt", "weights_hf", "Hugging Face's ImageGPT"),
    Format("tf", "igpt", "weights_openai", "OpenAI's image-gpt"),
  ),
  published="weights_openai:PUBLISHED",
  paper_scores="weights_openai:PAPER_SCORES",
)
