"""Training on all devices of all processes, with one global batch.

    python examples/mesh.py
    JAX_NUM_CPU_DEVICES=8 python examples/mesh.py     # eight simulated devices

In two processes, on two machines or on one, give each process its number:

    python examples/mesh.py --coordinator 127.0.0.1:1234 --processes 2 --process 0 &
    python examples/mesh.py --coordinator 127.0.0.1:1234 --processes 2 --process 1

If Slurm, Open MPI, Kubernetes or a TPU pod starts the processes, `--cluster` is enough.
Every process reads and embeds its part of the batch. The loss is that of the whole
batch, and the numbers are those of one device.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tripletjax as tj
from tripletjax.learn.data import datasets
from tripletjax.learn.data.sampling import ClassBatches


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)  # 8 x 8 pixels
        self.out = nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        x = self.out(jax.nn.relu(self.hidden(x)))
        return tj.normalize(x)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--coordinator", help="address and port of process 0")
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--cluster", action="store_true", help="JAX finds the others")
options = parser.parse_args()
if options.cluster:
    jax.distributed.initialize()
elif options.coordinator:
    jax.distributed.initialize(options.coordinator, options.processes, options.process)

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

graph, params = nnx.split(Network(nnx.Rngs(0)))
tx = optax.adam(1e-3)
params, optimizer = jax.device_put((params, tx.init(params)), everywhere)

data = datasets.load("digits")
batches = ClassBatches(
    data.train.labels,
    classes=8,
    per_class=16,
    shard=(jax.process_index(), jax.process_count()),
)


@jax.jit
def train_step(params, optimizer, images, labels):
    def loss_of(params):
        x = nnx.merge(graph, params)(images)
        return tj.blockwise.batch_semi_hard_loss(
            x, labels, margin=0.2, axis_name="data"
        )

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = tx.update(gradients, optimizer, params)
    return optax.apply_updates(params, updates), optimizer, loss


with jax.set_mesh(mesh):
    for step in range(options.steps):
        index = batches[step]
        images, labels = (
            jax.make_array_from_process_local_data(rows, np.asarray(part[index]))
            for part in (data.train.images, data.train.labels)
        )
        params, optimizer, loss = train_step(params, optimizer, images, labels)
        if (step + 1) % 50 == 0 and jax.process_index() == 0:
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)

# Every process has all parameters.
params = jax.tree.map(lambda x: x.addressable_data(0), params)
if jax.process_index() == 0:
    x = nnx.merge(graph, params)(jnp.asarray(data.test.images))
    metrics = tj.retrieval.evaluate(x, data.test.labels)
    print(f"{jax.device_count()} devices, MAP@R {100 * metrics.map_at_r:.1f} %")
