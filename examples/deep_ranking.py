"""Deep Ranking on handwritten digits: images in the order of their relevance.

Images of one digit are relevant to each other, and the more alike they are, the more
relevant. The network learns this order from triplets that are sampled by relevance, as
in Wang et al. Learning Fine-Grained Image Similarity with Deep Ranking. 2014.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import tripletjax as tj
from tripletjax.learn.networks.embedding_networks import MultiScaleCNN

STEPS, SIZE, GAP, DECAY = 400, 48, 0.3, 1e-3
# How relevance is counted, and triplets drawn: none counts for more than CAP, and two
# images of a digit are an order if they are LEAST apart.
WIDTH, CAP, LEAST, OUT_OF_CATEGORY = 0.08, 0.8, 0.1, 0.5

# The second half was written by other people than the first.
pixels, digits = load_digits(return_X_y=True)
images = jnp.asarray(pixels, jnp.float32).reshape(-1, 8, 8, 1) / 16
labels = jnp.asarray(digits, jnp.int32)
half = len(images) // 2
train, test = slice(0, half), slice(half, None)


def relevance_of(images: jax.Array, labels: jax.Array) -> jax.Array:
    """From 0 for another digit to 1 for a copy; replace it by numbers of your own."""
    apart = tj.squared_euclidean(images.reshape(len(images), -1))
    alike = jnp.exp(-apart / (WIDTH * 64))
    return jnp.where(labels[:, None] == labels, alike, 0)


relevance = relevance_of(images[train], labels[train])
draw = jax.jit(
    lambda key: tj.relevance_triplets(
        key,
        relevance,
        labels[train],
        size=SIZE,
        cap=CAP,
        gap=LEAST,
        out_of_category=OUT_OF_CATEGORY,
    )
)
model = MultiScaleCNN(64, channels=(16, 32), shallow=8, in_channels=1, rngs=nnx.Rngs(0))
# Weight decay is the regularisation of the paper.
schedule = optax.cosine_decay_schedule(2e-3, STEPS)
optimizer = nnx.Optimizer(
    model, optax.adamw(schedule, weight_decay=DECAY), wrt=nnx.Param
)


@nnx.jit
def step(model: MultiScaleCNN, optimizer: nnx.Optimizer, triplets: tj.Triplets):
    def loss_of(model):
        # One call for all three: the network is compiled once.
        x = model(images[train][jnp.concatenate(triplets[:3])])
        a, p, n = jnp.split(x, 3)
        return tj.triplet_margin_loss(
            *(a, p, n), margin=GAP, metric=tj.squared_euclidean, where=triplets.valid
        )

    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    return loss


def measure(x: jax.Array) -> str:
    """The share of 20,000 triplets of other writers whose order is right."""
    of_test = relevance_of(images[test], labels[test])
    parts = []
    for name, out in (("digits", 1.0), ("writing", 0.0)):
        triplets = tj.relevance_triplets(
            *(jax.random.key(1), of_test, labels[test]),
            size=20_000,
            cap=CAP,
            gap=LEAST,
            out_of_category=out,
        )
        three = jnp.stack(triplets[:3], axis=1)
        # If one set of negatives is empty, the negative comes from the other set.
        other = labels[test][triplets.negative] != labels[test][triplets.anchor]
        valid = triplets.valid & (other == (out > 0))
        order = tj.retrieval.similarity_precision(x, three, where=valid)
        score = tj.retrieval.score_at_top_k(x, three[:2000], k=30, where=valid[:2000])
        parts.append(
            f"{name} {order:.1%} in order, score@30 {score.score:.0f} of {score.count}"
        )
    return "; ".join(parts)


def embed(model: MultiScaleCNN) -> jax.Array:
    return jnp.concatenate([model(part) for part in jnp.split(images[test], 31)])


print("untrained:", measure(embed(model)))
loss = jnp.zeros(())
for key in tqdm(jax.random.split(jax.random.key(0), STEPS), disable=None):
    loss = step(model, optimizer, draw(key))
print(f"the last loss: {loss:.3f}")
print("trained:", measure(embed(model)))
assert np.isfinite(loss)
