"""
One-shot classification of unseen characters
============================================

An embedding classifies unseen classes. Here it is trained on the letters of some
scripts, in the twelve fonts that come with matplotlib, distorted at random. It then
classifies letters of other scripts by the nearest example. Each letter has one example,
in another font. The command for your own images is :command:`tripletjax identify`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.sampling import ImageBatches
from tripletjax.learn.networks.embedding_networks import EmbeddingCNN

folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
files = [
    file for file in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in file.name
]
fonts = [ImageFont.truetype(str(file), 22) for file in files]


def drawn(letters):
    """Images uint8 [letters * fonts, 32, 32, 1] of letters in every font."""
    images = []
    for letter in letters:
        for font in fonts:
            image = Image.new("L", (32, 32), 255)
            place = ImageDraw.Draw(image)
            place.text((16, 16), letter, font=font, anchor="mm", fill=0)
            images.append(np.asarray(image)[..., None])
    return np.stack(images), np.repeat(np.arange(len(letters)), len(fonts))


# %%
# Latin, Cyrillic, phonetic and mathematical characters to train on; Armenian and
# Georgian letters to be named. Only those that every font has.

known = {*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0x430, 0x450)}
known |= {*range(0x250, 0x2B0), *range(0x2200, 0x2300)}
unseen = {*range(0x561, 0x587), *range(0x10D0, 0x10F1)}
for file in files:
    there = FT2Font(str(file)).get_charmap()
    known, unseen = known & set(there), unseen & set(there)
images, labels = drawn([*map(chr, sorted(known))])
warp = Augment(shift=0.06, rotation=12, zoom=0.12, shear=0.1, elastic=0.06)

model = EmbeddingCNN(64, channels=(16, 32), rngs=nnx.Rngs(0))
batches = ImageBatches(images, labels, classes=20, per_class=4)
lines = learn.fit(
    model, optax.adam(2e-3), batches, steps=300, augment=warp, progress=False
)
print([*lines][-1])

# %%
# Images of scripts never seen, bent as well. One-shot accuracy depends on which example
# was given: 200 episodes of 20 letters, each with one example to name the others by.

probes, names = drawn([*map(chr, sorted(unseen))])
bent = np.uint8(255 * warp(jax.random.key(1), jnp.asarray(probes / 255, jnp.float32)))
views = {
    "pixels": jnp.asarray(bent.reshape(len(bent), -1) / 255, jnp.float32),
    "trained on other scripts": jnp.asarray(learn.embed_images(model, bent)),
}
random = np.random.default_rng(0)
episodes = []
for _ in range(200):
    letters = random.choice(len(unseen), 20, replace=False)
    episodes.append([random.permutation(np.flatnonzero(names == c)) for c in letters])
episodes = np.array(episodes)  # [200, 20, fonts]
queries = episodes[:, :, 4:].reshape(200, -1)

figure, axes = plt.subplots(layout="constrained")
for name, x in views.items():
    found = []
    for shots in (1, 2, 4):
        support = episodes[:, :, :shots].reshape(200, -1)
        accuracy = tj.retrieval.few_shot_accuracy(
            *(x[support], names[support], x[queries], names[queries]), class_means=True
        )
        found.append(100 * accuracy)
    low, middle, high = np.quantile(np.array(found), (0.05, 0.5, 0.95), axis=1)
    print(name, middle)
    axes.plot((1, 2, 4), middle, "o-", label=name)
    axes.fill_between((1, 2, 4), low, high, alpha=0.2)
axes.set_xticks((1, 2, 4))
axes.set_xlabel("examples of each letter")
axes.set_ylabel("accuracy of 20 letters, in %")
axes.set_title("Letters of unseen scripts\nMedian and middle 90 % of the episodes")
axes.legend()
plt.show()

# %%
# Some of the letters.

sheet = np.concatenate([bent[names == c][:10, :, :, 0] for c in range(6)])
figure, axes = plt.subplots(6, 10, figsize=(6, 3.8), layout="constrained")
for panel, image in zip(axes.flat, sheet):
    panel.imshow(image, cmap="gray", vmin=0, vmax=255)
    panel.axis("off")
figure.suptitle("Six of the letters, in ten fonts")
plt.show()
