"""Train embeddings of sentences, from the docstrings of Python's standard library.

The sentences of a module are a class. The network takes a dict of tokens and a mask:
`learn.fit` trains any model on any inputs.
"""

import ast
import re
import sys
import sysconfig
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data.sampling import ClassBatches

STEPS = 300
CLASSES, PER_CLASS, MARGIN = 32, 8, 0.2
BUCKETS, LENGTH, DIM = 2**14, 32, 128
# Sentences of a module that are held out, and the least number of all.
HELD_OUT, LEAST = 8, 24


def sentences_of(file: Path) -> list[str]:
    """The sentences of the docstrings in a file, of at least four words."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    texts = " ".join(f"{ast.get_docstring(node) or ''}\n" for node in nodes)
    sentences = re.split(r"(?<=[.!?])\s+|\n\s*\n", texts)
    return [sentence for sentence in sentences if len(words_of(sentence)) >= 4]


def words_of(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


def read_modules() -> dict[str, list[str]]:
    """Different sentences of each module, without sentences of several modules."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for name in sorted(sys.stdlib_module_names):
        files = [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]
        files = [x for x in files if x.is_file() and "test" not in x.parent.name]
        sentences = [sentence for file in files for sentence in sentences_of(file)]
        modules[name] = {" ".join(words_of(x)): x for x in sentences}
    texts = [text for sentences in modules.values() for text in sentences]
    several = {text for text, n in zip(*np.unique(texts, return_counts=True)) if n > 1}
    modules = {
        name: [x for text, x in sentences.items() if text not in several]
        for name, sentences in modules.items()
    }
    return {name: x for name, x in modules.items() if len(x) >= LEAST}


def encode(sentences: list[str]) -> dict[str, np.ndarray]:
    """Words as numbers of hash buckets, and a mask of the words that exist."""
    tokens = np.zeros((len(sentences), LENGTH), np.int32)
    mask = np.zeros((len(sentences), LENGTH), bool)
    for row, sentence in enumerate(sentences):
        hashes = [zlib.crc32(word.encode()) % BUCKETS for word in words_of(sentence)]
        hashes = hashes[:LENGTH]
        tokens[row, : len(hashes)], mask[row, : len(hashes)] = hashes, True
    return {"tokens": tokens, "mask": mask}


class SentenceNetwork(nnx.Module):
    """The weighted mean of the vectors of words, with learned weights."""

    def __init__(self, rngs: nnx.Rngs):
        self.words = nnx.Embed(BUCKETS, DIM, rngs=rngs)
        self.weights = nnx.Embed(
            BUCKETS, 1, embedding_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, inputs: dict[str, jax.Array]) -> jax.Array:
        tokens, mask = inputs["tokens"], inputs["mask"]
        logits = jnp.where(mask, self.weights(tokens)[..., 0], -jnp.inf)
        x = jnp.einsum("bt,btd->bd", jax.nn.softmax(logits), self.words(tokens))
        return tj.normalize(x)


class Batches:
    """Batches of CLASSES modules with PER_CLASS sentences each, by the step alone."""

    def __init__(self, inputs: dict[str, np.ndarray], labels: np.ndarray):
        self.inputs, self.labels = inputs, labels
        self.rows = ClassBatches(labels, classes=CLASSES, per_class=PER_CLASS)

    def __getitem__(self, step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = self.rows[step]
        return {name: x[rows] for name, x in self.inputs.items()}, self.labels[rows]


def drop_words(key: jax.Array, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Leave out a fifth of the words, but not the first, against memorizing."""
    kept = jax.random.bernoulli(key, 0.8, inputs["mask"].shape).at[:, 0].set(True)
    return inputs | {"mask": inputs["mask"] & kept}


def loss(x: jax.Array, labels: jax.Array) -> jax.Array:
    return tj.blockwise.batch_semi_hard_loss(x, labels, margin=MARGIN)


def print_retrieval(name: str, model: nnx.Module) -> None:
    metrics = tj.retrieval.evaluate(learn.embed_images(model, test), test_labels)
    print(f"{name:<12}MAP@R {100 * metrics.map_at_r:.1f} %", end="  ")
    print(f"recall@1 {100 * metrics.precision_at_1:.1f} %")


modules = read_modules()
draw = np.random.default_rng(0)
shuffled = [draw.permutation(sentences).tolist() for sentences in modules.values()]
train = encode([x for sentences in shuffled for x in sentences[HELD_OUT:]])
test = encode([x for sentences in shuffled for x in sentences[:HELD_OUT]])
train_labels = np.repeat(
    np.arange(len(shuffled)), [len(x) - HELD_OUT for x in shuffled]
)
test_labels = np.repeat(np.arange(len(shuffled)), HELD_OUT)
print(f"{len(modules)} modules, {len(train_labels)} sentences to train on")
print(f"retrieval among {len(test_labels)} held-out sentences, by their module:")

model = SentenceNetwork(nnx.Rngs(0))
print_retrieval("untrained", model)
tx = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
batches = Batches(train, train_labels.astype(np.int32))
for record in learn.fit(
    model, tx, batches, steps=STEPS, loss=loss, augment=drop_words, log_every=STEPS
):
    print(f"step {record['step']}: loss {record['loss']:.2f}")
print_retrieval("trained", model)
