"""From files to batches: sources, transforms, pipeline. numpy, OpenCV, Pillow and Grain; never jax.

    source = load_source("demo:digits", "train")              # sources.py: indexable examples
    transforms = build_transforms([dict(name="resize", size=32)])    # transforms.py
    batches = train_batches(source, transforms, batch_size=64, seed=0)      # pipeline.py

Nothing here imports jax or flax, so a worker process never reaches for an accelerator.
"""
