"""pytorch-metric-learning: the loss of all triplets, and the miners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer_tools import (
    DEGENERATE,
    LABELS,
    assert_nothing,
    assert_same,
    embeddings,
    on_matrix,
    triplet_set,
)

import tripletjax as tj
from tripletjax import mining

torch = pytest.importorskip("torch")
pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import (  # noqa: E402
    distances,
    losses,
    miners,
    reducers,
)

PLAIN = {"normalize_embeddings": False}
every_labels = pytest.mark.parametrize("name", LABELS)
every_seed = pytest.mark.parametrize("seed", range(3))


def mined(miner, x, labels):
    """Their triplets, as a set; pairs are combined over the anchors they share."""
    got = [part.tolist() for part in miner(torch.tensor(x), torch.tensor(labels))]
    if len(got) == 3:
        return set(zip(*got))
    a1, p, a2, n = got
    return {(a, i, j) for a, i in zip(a1, p) for b, j in zip(a2, n) if a == b}


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("swap", [False])
@every_seed
@every_labels
def test_loss_of_all_triplets(name, seed, smooth, swap):
    labels = LABELS[name]
    theirs = losses.TripletMarginLoss(
        margin=0.4,
        swap=swap,
        smooth_loss=smooth,
        distance=distances.LpDistance(**PLAIN),
        reducer=reducers.AvgNonZeroReducer(),
    )
    hinge = jax.nn.softplus if smooth else jax.nn.relu
    assert_same(
        on_matrix(tj.batch_all_loss, labels, margin=0.4, hinge=hinge),
        lambda x: theirs(x, torch.tensor(labels)),
        embeddings(seed),
    )


@every_seed
def test_loss_of_all_triplets_above_25_rows(seed):
    """In float64: in float32 their distances lose digits there."""
    labels = np.arange(40) % 9
    theirs = losses.TripletMarginLoss(
        margin=0.4, distance=distances.LpDistance(**PLAIN)
    )
    assert_same(
        on_matrix(tj.batch_all_loss, labels, margin=0.4),
        lambda x: theirs(x, torch.tensor(labels)),
        embeddings(seed, n=40),
    )


def test_loss_with_references():
    x, y = embeddings(0, n=6), embeddings(1, n=10)
    labels, other = np.arange(6) % 3, np.arange(10) % 3
    theirs = losses.TripletMarginLoss(
        margin=0.4, distance=distances.LpDistance(**PLAIN)
    )
    references = torch.tensor(y)
    assert_same(
        lambda x: tj.batch_all_loss(
            tj.euclidean(x, y), labels, reference_labels=other, margin=0.4
        ),
        lambda x: theirs(
            x, torch.tensor(labels), ref_emb=references, ref_labels=torch.tensor(other)
        ),
        x,
    )


@pytest.mark.parametrize("name", DEGENERATE)
def test_no_triplet(name):
    assert_nothing(on_matrix(tj.batch_all_loss, DEGENERATE[name]), embeddings(0))


@every_seed
@every_labels
def test_batch_hard_miner(name, seed):
    x, labels = embeddings(seed), LABELS[name]
    theirs = miners.BatchHardMiner(distance=distances.LpDistance(**PLAIN))
    got = tj.batch_hard_triplets(tj.euclidean(x), labels)
    assert triplet_set(got) == mined(theirs, x, labels)


CHOICES = {
    "easy": (mining.easiest_positive, mining.easiest_negative),
    "semihard": (mining.semi_hard_positive, mining.semi_hard_negative),
    "hard": (mining.hardest_positive, mining.hardest_negative),
    "all": (mining.all_candidates, mining.all_candidates),
}


@every_labels
@pytest.mark.parametrize("negative", CHOICES)
@pytest.mark.parametrize("positive", CHOICES)
def test_batch_easy_hard_miner(positive, negative, name):
    labels = LABELS[name]
    options = {
        "positive": CHOICES[positive][0],
        "negative": CHOICES[negative][1],
    }
    refused = positive == negative == "semihard" or {positive, negative} == {
        "semihard",
        "all",
    }
    if refused or positive == negative == "all":
        with pytest.raises(ValueError, match=r"both|cannot be combined|relative"):
            tj.batch_easy_hard_triplets(tj.euclidean(embeddings(0)), labels, **options)
        if refused:
            with pytest.raises(ValueError, match="semihard"):
                miners.BatchEasyHardMiner(positive, negative)
        return
    theirs = miners.BatchEasyHardMiner(
        positive, negative, distance=distances.LpDistance(**PLAIN)
    )
    for seed in range(3):
        x = embeddings(seed)
        got = tj.batch_easy_hard_triplets(tj.euclidean(x), labels, **options)
        assert triplet_set(got) == mined(theirs, x, labels)


@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
@every_labels
def test_triplet_margin_miner(name, margin, kind):
    labels = LABELS[name]
    band = {
        "all": tj.violating_band(margin),
        "hard": tj.hard_band(),
        "semihard": tj.semi_hard_band(margin),
        "easy": tj.easy_band(margin),
    }[kind]
    theirs = miners.TripletMarginMiner(
        margin=margin,
        type_of_triplets=kind,
        distance=distances.LpDistance(**PLAIN),
    )
    for seed in range(3):
        x = np.float32(embeddings(seed))
        got = tj.all_triplets(labels, size=16**3, distances=tj.euclidean(x), band=band)
        assert triplet_set(got) == mined(theirs, x, labels)


def test_distance_weighted_miner_draws_alike():
    labels = LABELS["p x k"]
    x = embeddings(0, dim=8)
    x[1] = x[0] + 0.1 * x[1]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    torch.manual_seed(0)
    miner = miners.DistanceWeightedMiner()
    counts = np.zeros((2, 16, 16))
    for _ in range(150):
        a, _, n = miner(torch.tensor(x), torch.tensor(labels))
        np.add.at(counts[0], (a.numpy(), n.numpy()), 1)
    draw = jax.vmap(
        lambda key: tj.distance_weighted_triplets(key, tj.euclidean(x), labels, dim=8)
    )
    drawn = draw(jax.random.split(jax.random.key(0), 500))
    valid = np.asarray(drawn.valid)
    np.add.at(
        counts[1],
        (np.asarray(drawn.anchor)[valid], np.asarray(drawn.negative)[valid]),
        1,
    )
    shares = counts / counts.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(shares[1], shares[0], atol=0.08)
    assert ((shares[0] > 0.01) <= (shares[1] > 0)).all()


def test_near_duplicates_lose_their_digits_there():
    """Above 25 rows torch's distances come from a product: 1e-3 is off by percents."""
    x = np.float32(embeddings(0, n=64, dim=128))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[1] = x[0]
    x[1, 0] += np.float32(1e-3)
    exact = abs(float(x[1, 0]) - float(x[0, 0]))
    theirs = distances.LpDistance(**PLAIN)(torch.tensor(x))[0, 1]
    assert abs(float(theirs) / exact - 1) > 1e-3
    ours = tj.euclidean.paired(jnp.asarray(x[0]), jnp.asarray(x[1]))
    np.testing.assert_allclose(ours, exact, rtol=1e-6)


@pytest.mark.parametrize("size", [20, 16, 64])
def test_cross_batch_memory(size):
    """Queue, loss and gradient; anchors see the queue with the batch in it."""
    theirs = losses.CrossBatchMemory(
        losses.TripletMarginLoss(
            margin=0.4,
            distance=distances.LpDistance(**PLAIN),
            reducer=reducers.AvgNonZeroReducer(),
        ),
        embedding_size=4,
        memory_size=size,
    )
    memory = tj.memory.create(size, 4)
    random = np.random.default_rng(0)
    for _ in range(7):
        x = random.normal(size=(8, 4)).astype(np.float32)
        labels = random.integers(0, 4, 8)
        of_torch = torch.tensor(x, requires_grad=True)
        value = theirs(of_torch, torch.tensor(labels))
        value.backward()
        slots = (memory.position + np.arange(8)) % size
        memory = tj.memory.push(memory, x, labels.astype(np.int32))
        ours = jax.value_and_grad(
            lambda x, labels=labels, memory=memory, slots=slots: (
                tj.blockwise.batch_all_loss(
                    x,
                    labels,
                    margin=0.4,
                    references=memory.embeddings,
                    reference_labels=memory.labels,
                    reference_where=memory.valid,
                    positions=slots,
                )
            )
        )(x)
        np.testing.assert_allclose(ours[0], value.item(), rtol=1e-5)
        np.testing.assert_allclose(ours[1], of_torch.grad, atol=1e-6)
        np.testing.assert_array_equal(memory.embeddings, theirs.embedding_memory)
        np.testing.assert_array_equal(memory.labels, theirs.label_memory)
        assert memory.position == theirs.queue_idx
