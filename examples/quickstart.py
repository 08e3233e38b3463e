"""Losses, mining, gradients and sweeps in plain JAX, on random embeddings."""

import jax
import jax.numpy as jnp

import tripletjax as tj

embeddings = tj.normalize(jax.random.normal(jax.random.key(0), (32, 16)))
labels = jnp.arange(32) % 8

# A loss takes the distances of any metric.
distances = tj.euclidean(embeddings)
for loss in (tj.batch_all_loss, tj.batch_hard_loss, tj.batch_semi_hard_loss):
    print(f"{loss.__name__:<22}{loss(distances, labels, margin=0.2):.4f}")

# Mining returns indices of triplets, and `triplet_loss` is their loss.
triplets = tj.batch_hard_triplets(distances, labels)
print("anchor 0: positive", triplets.positive[0], "negative", triplets.negative[0])
print(f"loss of the triplets  {tj.triplet_loss(distances, triplets, margin=0.2):.4f}")


# Gradients go through to the embeddings; a few steps of descent lower the loss.
def loss_of(embeddings, margin):
    return tj.batch_all_loss(tj.euclidean(embeddings), labels, margin=margin)


value, gradient = jax.value_and_grad(loss_of)(embeddings, 0.2)
print(f"after one step        {loss_of(embeddings - 0.5 * gradient, 0.2):.4f}")

# The margin may be traced: a sweep is one vmap.
margins = jnp.array([0.0, 0.1, 0.2, 0.5, 1.0])
print("margins", margins, "losses", jax.vmap(loss_of, (None, 0))(embeddings, margins))

# Padding changes nothing.
where = jnp.arange(40) < 32
padded = jnp.pad(distances, ((0, 8), (0, 8)))
loss = tj.batch_all_loss(padded, jnp.pad(labels, (0, 8)), margin=0.2, where=where)
print(f"padded batch-all      {loss:.4f}")
