"""Losses of runs: their values, their options, and the parameters that they learn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from programs import compilations

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.training import loop, losses, objectives
from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.losses import LOSSES

LABELS = jnp.arange(24) % 6
SGD = optax.sgd(0.1)


def unit_vectors(n=24, dim=5, seed=0):
    return tj.normalize(jax.random.normal(jax.random.key(seed), (n, dim)))


class Linear(nnx.Module):
    """Unit vectors of images of 2 x 2 pixels."""

    def __init__(self):
        self.linear = nnx.Linear(4, 5, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return tj.normalize(self.linear(images.reshape(len(images), -1)))


def batches(count=6):
    images = np.random.default_rng(0).random((24, 2, 2, 1), np.float32)
    return [(images + step / 10, np.array(LABELS)) for step in range(count)]


def learned(name, **options):
    options = {"classes": 6, "dim": 5, "learning_rate": 0.01} | options
    return objectives.learned_loss(name, **options)


def trained(steps=6, **options):
    model = Linear()
    lines = list(
        loop.fit(
            model, SGD, batches(), steps=steps, log_every=1, progress=False, **options
        )
    )
    return model, lines


def defaults_of(one):
    """Arguments that the table gives a loss besides the defaults of its function."""
    return {} if one.metric is None else {"metric": one.metric}


@pytest.mark.slow
@pytest.mark.parametrize("name", [k for k, v in LOSSES.items() if not v.class_vectors])
def test_losses_of_runs_are_the_public_functions_with_their_defaults(name):
    x, one = unit_vectors(), LOSSES[name]
    value, metrics = objectives.batch_loss(name)(x, LABELS)
    function, options = one.function, {"reduce_fn": one.mean}
    if name == "contrastive":
        function = tj.blockwise.contrastive_loss
    if one.mines_triplets:
        options["margin"] = losses.MARGIN
    expected = function(x, LABELS, **options, **defaults_of(one))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert list(metrics) == [one.share]
    assert 0 <= metrics[one.share] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [k for k, v in LOSSES.items() if v.class_vectors])
def test_losses_with_class_vectors(name):
    x, of = unit_vectors(), learned(name)
    vectors = of.parameters["class_vectors"]
    assert vectors.shape == (6, 5)
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    value, metrics = of.function(of.parameters, x, LABELS)
    expected = LOSSES[name].function(
        x, LABELS, references=vectors, reference_labels=jnp.arange(6)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert list(metrics) == ["recall_at_1"]


def test_the_recall_of_a_batch_by_hand():
    # The two in the middle are nearest to each other, in different classes.
    x = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    _, metrics = objectives.batch_loss("supcon")(x, jnp.array([0, 0, 1, 1]))
    np.testing.assert_allclose(metrics["recall_at_1"], 0.5)


def test_options_of_losses():
    x = unit_vectors()
    value, _ = objectives.batch_loss("contrastive", margin=0.7)(x, LABELS)
    expected = tj.contrastive_loss(tj.euclidean(x), LABELS, negative_margin=0.7)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    value, _ = objectives.batch_loss("supcon", temperature=0.3)(x, LABELS)
    expected = tj.supcon_loss(tj.cosine(x), LABELS, temperature=0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="temperature is not an option of the loss"):
        objectives.batch_loss("hard", temperature=0.1)
    with pytest.raises(ValueError, match="cosface requires class vectors"):
        objectives.batch_loss("cosface")
    with pytest.raises(ValueError, match="circle has no parameters to learn"):
        learned("circle")


def test_learned_parameters_begin_with_the_loss_of_the_same_numbers():
    x = unit_vectors()
    for name, options in (("nt-xent", {"temperature": 0.2}), ("sigmoid", {"scale": 5})):
        of = learned(name, **options)
        value, metrics = of.function(of.parameters, x, LABELS)
        expected, _ = objectives.batch_loss(name, **options)(x, LABELS)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for option, number in options.items():
            np.testing.assert_allclose(metrics[option], number, rtol=1e-6)


@pytest.mark.slow
def test_training_moves_parameters_against_their_gradient():
    of = learned("nt-xent", temperature=0.5)
    _, lines = trained(2, loss=of)

    def value(parameters):
        images, labels = batches()[0]
        x = Linear()(jnp.asarray(images))
        return of.function(parameters, x, labels)[0]

    gradient = jax.grad(value)(of.parameters)["temperature"]
    # The first step of Adam is the learning rate, whatever the gradient.
    moved = np.log(lines[1]["temperature"]) - np.log(lines[0]["temperature"])
    np.testing.assert_allclose(moved, -0.01 * np.sign(gradient), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosface", "sigmoid"])
def test_learned_losses_in_chunks_and_after_a_resume(name, tmp_path):
    def numbers(lines):
        return [line for line in lines if "loss" in line]

    model, lines = trained(loss=learned(name), ema_decay=0.5)
    in_chunks, chunked = trained(loss=learned(name), ema_decay=0.5, embed_chunk_size=7)
    for one, two in zip(lines, chunked, strict=True):
        assert one.keys() == two.keys()
        np.testing.assert_allclose([*one.values()], [two[k] for k in one], rtol=1e-4)
    checkpoints = Checkpoints(tmp_path / "states")
    options = {
        "loss": learned(name),
        "ema_decay": 0.5,
        "checkpoints": checkpoints,
        "checkpoint_every": 3,
    }
    stopped = loop.fit(Linear(), SGD, batches(), steps=6, log_every=1, **options)
    first = list(itertools.islice(stopped, 4))
    stopped.close()
    resumed, rest = trained(**options)
    assert rest[0] == {"step": 3, "resumed": True, "damaged": []}
    assert first[:3] + rest[1:] == numbers(lines)
    for one, two, three in zip(
        *(jax.tree.leaves(nnx.state(x)) for x in (model, resumed, in_chunks))
    ):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, atol=1e-5)
    checkpoints.close()


@pytest.mark.slow
def test_one_program_serves_two_trainings_of_a_learned_loss():
    trained(1, loss=learned("nca"))
    with compilations() as lines:
        trained(1, loss=learned("nca"))
    assert not [line for line in lines if "train_step" in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.1},
            "temperature requires loss supcon, nt-xent, .*semi-hard",
        ),
        (
            {"loss": "supcon", "margin": 0.1},
            "margin requires loss semi-hard, hard, all",
        ),
        (
            {"loss": "supcon", "temperature": 0.0},
            "temperature must be finite .*above 0, got 0.0",
        ),
        ({"loss": "circle", "learn_loss": True}, "learn_loss requires loss supcon"),
        ({"loss": "cosface", "memory": 64}, "memory cannot be combined with loss cosf"),
        (
            {"loss": "nca", "relevance": "folders"},
            "relevance folders requires loss semi",
        ),
    ],
)
def test_options_that_a_loss_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        learn.Config(**options)
