"""Training on inputs that are no images, with models of any library."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data.sampling import ClassBatches
from tripletjax.learn.networks.embedding import as_floats

WORDS, LENGTH, DIM = 12, 5, 8


def sentences(n=48):
    """Tokens and masks of classes, each with words of its own."""
    draw = np.random.default_rng(0)
    labels = np.arange(n) % 4
    tokens = 3 * labels[:, None] + draw.integers(0, 3, (n, LENGTH))
    mask = np.arange(LENGTH) < draw.integers(2, LENGTH + 1, n)[:, None]
    # Where the mask is False, the tokens are those of any class.
    tokens = np.where(mask, tokens, draw.integers(0, WORDS, (n, LENGTH)))
    return {"tokens": tokens.astype(np.int32), "mask": mask}, labels.astype(np.int32)


class Batches:
    """Batches of a pytree, a pure function of the step."""

    def __init__(self):
        self.inputs, self.labels = sentences()
        self.rows = ClassBatches(self.labels, classes=4, per_class=4)

    def __getitem__(self, step):
        rows = self.rows[step]
        return {k: x[rows] for k, x in self.inputs.items()}, self.labels[rows]


class MeanOfWords(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Embed(WORDS, DIM, rngs=rngs)

    def __call__(self, inputs):
        assert inputs["tokens"].dtype == jnp.int32
        assert inputs["mask"].dtype == jnp.bool_
        x = self.words(inputs["tokens"]) * inputs["mask"][..., None]
        return tj.normalize(x.sum(axis=1))


def trained(model=None, **options):
    model = MeanOfWords(nnx.Rngs(0)) if model is None else model
    options = {"batches": Batches(), "steps": 12, "progress": False} | options
    records = [*learn.fit(model, optax.adam(0.05), **options)]
    return model, records


def test_inputs_are_any_pytree():
    inputs, labels = sentences()
    model = MeanOfWords(nnx.Rngs(0))
    before = tj.retrieval.evaluate(learn.embed_images(model, inputs), labels)
    model, records = trained(model, steps=40)
    x = learn.embed_images(model, inputs)
    after = tj.retrieval.evaluate(x, labels)
    assert before.map_at_r < 0.9 < 0.99 < after.map_at_r
    assert records[-1]["step"] == 40
    # In batches that do not divide the rows, as at once.
    np.testing.assert_allclose(x, model(inputs), atol=1e-6)
    np.testing.assert_allclose(
        learn.embed_images(model, inputs, batch_size=7), x, atol=1e-6
    )


@pytest.mark.slow
def test_chunks_and_devices_make_no_difference():
    expected = trained()[0].words.embedding.get_value()
    mesh = jax.make_mesh((4,), ("data",))
    for options in (
        {"embed_chunk_size": 5},
        {"mesh": mesh},
        {"mesh": mesh, "embed_chunk_size": 8},
    ):
        actual = trained(**options)[0].words.embedding.get_value()
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_memory_and_augmentation_take_a_pytree():
    def drop_last(key, inputs):
        return inputs | {"mask": inputs["mask"].at[:, -1].set(False)}

    model, records = trained(memory=32, augment=drop_last)
    plain, _ = trained()
    assert np.isfinite(records[-1]["loss"])
    different = model.words.embedding.get_value() - plain.words.embedding.get_value()
    assert np.abs(different).max() > 1e-3


def test_only_uint8_is_scaled():
    np.testing.assert_allclose(as_floats(np.uint8([0, 51])), [0, 0.2])
    for dtype in (np.int32, np.uint16, np.bool_):
        assert as_floats(np.ones(2, dtype)).dtype == dtype
    assert as_floats(np.ones(2, np.float16)).dtype == np.float32


@pytest.mark.parametrize("memory", [0, pytest.param(32, marks=pytest.mark.slow)])
def test_batches_in_order_are_those_by_step(memory):
    """Such as those of a DataLoader: read in order, and again from the start."""

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            batches = Batches()
            return (batches[step] for step in range(5))

    class Repeated(Batches):
        def __getitem__(self, step):
            return super().__getitem__(step % 5)

    loader = Loader()
    expected, _ = trained(batches=Repeated(), memory=memory)
    actual, _ = trained(batches=loader, memory=memory)
    np.testing.assert_array_equal(
        actual.words.embedding.get_value(), expected.words.embedding.get_value()
    )
    assert loader.passes == 3


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], IndexError, "list index"),
        (set(), ValueError, "batches must have a batch, got none"),
        (3, TypeError, "batches must have batches"),
        (
            iter([Batches()[step] for step in range(3)]),
            TypeError,
            "or be an iterable that can be read again",
        ),
        (
            [
                (
                    {"tokens": np.zeros((4, 2)), "mask": np.zeros((3, 2))},
                    np.zeros(4, int),
                )
            ],
            ValueError,
            "same number of rows, got 3, 4",
        ),
        ([({}, np.zeros(4, int))], ValueError, "got no array"),
    ],
)
def test_bad_batches_are_named(batches, error, words):
    with pytest.raises(error, match=words):
        trained(batches=batches)
    inputs, _ = sentences(4)
    with pytest.raises(ValueError, match="same number of rows, got 3, 4"):
        learn.embed_images(None, inputs | {"mask": inputs["mask"][:3]})
    with pytest.raises(ValueError, match="must not be empty"):
        learn.embed_images(None, {"tokens": np.zeros((0, 3))})


def test_functions_with_parameters_are_models():
    def embed(params, inputs):
        x = params["words"][inputs["tokens"]] * inputs["mask"][..., None]
        return tj.normalize(x.sum(axis=1))

    words = MeanOfWords(nnx.Rngs(0)).words.embedding.get_value()
    model = learn.as_model(embed, {"words": words})
    trained(model)
    expected, _ = trained()
    assert [*model.params] == ["words"]
    np.testing.assert_allclose(
        model.params["words"], expected.words.embedding.get_value(), atol=1e-6
    )
    for bad in ({"w": np.zeros(2, int)}, {"w": 1.0}):
        with pytest.raises(
            TypeError, match=r"params must be arrays of floats, got.*'w'"
        ):
            learn.as_model(embed, bad)
