"""The losses inside jit, vmap and scan: training several networks at once.

One compiled program trains a Flax network for each margin: `scan` goes over the steps
of a functional training loop, and `vmap` over the margins.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tripletjax as tj

MARGINS = jnp.array([0.05, 0.1, 0.2, 0.5, 1.0])
CLASSES, PER_CLASS, STEPS = 8, 8, 200


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(16, 64, rngs=rngs)
        self.out = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        x = self.out(jax.nn.relu(self.hidden(x)))
        return tj.normalize(x)


def sample(key):
    """Points around one centre per class, where most directions are noise."""
    centres = jnp.pad(
        jax.random.normal(jax.random.key(7), (CLASSES, 4)), [(0, 0), (0, 12)]
    )
    labels = jnp.repeat(jnp.arange(CLASSES), PER_CLASS)
    noise = jax.random.normal(key, (CLASSES * PER_CLASS, 16))
    return centres[labels] + noise * jnp.array([0.3] * 4 + [2.0] * 12), labels


# The functional loop: the graph is static, the state is what scan carries.
graph, initial = nnx.split(Network(nnx.Rngs(0)))
tx = optax.adam(3e-3)


def train(margin, key):
    def loss_of(state, x, labels):
        network = nnx.merge(graph, state)
        return tj.batch_all_loss(tj.euclidean(network(x)), labels, margin=margin)

    def step(carry, key):
        state, opt_state = carry
        loss, gradient = jax.value_and_grad(loss_of)(state, *sample(key))
        updates, opt_state = tx.update(gradient, opt_state, state)
        return (optax.apply_updates(state, updates), opt_state), loss

    keys = jax.random.split(key, STEPS)
    (state, _), losses = jax.lax.scan(step, (initial, tx.init(initial)), keys)
    x, labels = sample(jax.random.key(123))
    return losses, tj.retrieval.evaluate(nnx.merge(graph, state)(x), labels).map_at_r


losses, map_at_r = jax.jit(jax.vmap(train, in_axes=(0, None)))(
    MARGINS, jax.random.key(1)
)
x, labels = sample(jax.random.key(123))
print(f"MAP@R of the raw points  {tj.retrieval.evaluate(x, labels).map_at_r:.3f}")
for margin, loss, score in zip(MARGINS, losses, map_at_r):
    print(
        f"margin {margin:.2f}: loss {loss[0]:.3f} -> {loss[-1]:.3f}, MAP@R {score:.3f}"
    )
