"""Values of settings that are one of a few words.

The command lists them in its help, which works without the extra ``train``: this module
imports nothing.
"""

# Held out are images of every class, or whole classes.
SPLITS = ("images", "classes")
# Which of nested folders are classes.
CLASSES_FROM = ("top", "leaf")
MINING = ("all", "semi-hard", "hard")
# Classes are drawn alike, or by their number of images.
CLASS_SAMPLING = ("uniform", "frequency")
RELEVANCE = ("classes", "folders")
# Types of images, on which sizes and networks depend.
KINDS = ("photos", "characters")
# Networks that are trained from scratch; `embedding_networks.MODELS` and
# `backbones.UNTRAINED` have their definitions.
MODELS = ("cnn", "photo", "resnet", "multiscale", "resnet18", "resnet34", "resnet50")
# Parts of a pretrained network that are trained.
TRAININGS = ("frozen", "top", "all")
