"""Constants of the published models; imports nothing, so that the data pipeline can use them."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels in [0, 1], one value per channel, as in torchvision."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's pixels in [0, 1], one value per channel."""
