"""Constants of the published models, as in torchvision, of RGB in [0, 1]; imports nothing."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
