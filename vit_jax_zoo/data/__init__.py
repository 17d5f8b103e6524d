"""From files to batches: sources, transforms, pipeline; numpy, OpenCV, Pillow, Grain; never jax."""
