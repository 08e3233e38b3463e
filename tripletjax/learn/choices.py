"""Values of settings that are one of a few words.

The command lists them in its help, which works without the extra ``train``: this module
imports nothing.
"""

SPLITS = ("images", "classes")
CLASSES_FROM = ("top", "leaf")
MINING = ("all", "semi-hard", "hard")
CLASS_SAMPLING = ("uniform", "frequency")
RELEVANCE = ("classes", "folders")
# Types of images, on which sizes and networks depend.
KINDS = ("photos", "characters")
# Networks that are trained from scratch; `config.MODELS` and `backbones.UNTRAINED`
# have their definitions.
MODELS = ("cnn", "photo", "resnet", "multiscale", "resnet18", "resnet34", "resnet50")
# Parts of a pretrained network that are trained.
TRAININGS = ("frozen", "top", "all")
