"""pytorch-metric-learning: the loss of all triplets, losses of pairs, and miners."""

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
every_labels_name = pytest.mark.parametrize("labels_name", LABELS)
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


COSINE = distances.CosineSimilarity()


# name -> (our loss, our options, our metric, their loss)
PAIR_LOSSES = {
    "supcon": (
        tj.supcon_loss,
        {"temperature": 0.2},
        tj.cosine,
        losses.SupConLoss(temperature=0.2),
    ),
    "nt_xent": (
        tj.nt_xent_loss,
        {"temperature": 0.07},
        tj.cosine,
        losses.NTXentLoss(temperature=0.07),
    ),
    "nca": (
        tj.nca_loss,
        {"temperature": 0.1},
        tj.cosine,
        losses.NCALoss(softmax_scale=10, distance=COSINE),
    ),
    "multi_similarity": (
        tj.multi_similarity_loss,
        {},
        tj.cosine,
        losses.MultiSimilarityLoss(),
    ),
    "circle": (tj.circle_loss, {}, tj.cosine, losses.CircleLoss()),
    "contrastive": (
        tj.contrastive_loss,
        {"positive_margin": 0.5, "negative_margin": 3.0},
        tj.euclidean,
        losses.ContrastiveLoss(
            pos_margin=0.5, neg_margin=3, distance=distances.LpDistance(**PLAIN)
        ),
    ),
}


@every_seed
@pytest.mark.parametrize("name", PAIR_LOSSES)
@every_labels_name
def test_losses_of_pairs(labels_name, name, seed):
    loss, options, metric, theirs = PAIR_LOSSES[name]
    labels = LABELS[labels_name]
    assert_same(
        on_matrix(loss, labels, metric=metric, **options),
        lambda x: theirs(x, torch.tensor(labels)),
        embeddings(seed),
        rtol=1e-8,
    )


@every_seed
@every_labels_name
def test_multi_similarity_with_its_miner(labels_name, seed):
    labels = LABELS[labels_name]
    miner, theirs = miners.MultiSimilarityMiner(0.1), losses.MultiSimilarityLoss()

    def mined_loss(x):
        return theirs(x, torch.tensor(labels), miner(x, torch.tensor(labels)))

    loss = on_matrix(tj.multi_similarity_loss, labels, metric=tj.cosine, epsilon=0.1)
    assert_same(loss, mined_loss, embeddings(seed), rtol=1e-8)


@every_seed
@pytest.mark.parametrize("labels_name", ["p x k", "two classes"])
def test_generalized_lifted_structure(labels_name, seed):
    """An anchor without a positive has a loss there, of its negatives alone."""
    labels = LABELS[labels_name]
    theirs = losses.GeneralizedLiftedStructureLoss(
        distance=distances.LpDistance(**PLAIN)
    )
    assert_same(
        on_matrix(tj.generalized_lifted_structure_loss, labels),
        lambda x: theirs(x, torch.tensor(labels)),
        embeddings(seed),
        rtol=1e-8,
    )


@every_seed
@pytest.mark.parametrize("labels_name", ["p x k", "two classes"])
def test_margin_loss(labels_name, seed):
    """Of all triplets there: a pair counts as often as it is in a triplet."""
    labels = LABELS[labels_name]

    def reduce_fn(terms):
        sides = terms.positives, terms.negatives
        weights = terms.negatives.valid, terms.positives.valid
        total, active = (
            sum((getattr(s, key) * w).sum() for s, w in zip(sides, weights))
            for key in ("total", "active")
        )
        return total / active

    theirs = losses.MarginLoss(margin=0.3, distance=distances.LpDistance(**PLAIN))

    # The last numbers are boundaries: one for each class.
    def ours(numbers):
        d, beta = tj.euclidean(numbers[:96].reshape(16, 6)), numbers[96:]
        options = {"margin": 0.3, "reduce_fn": reduce_fn}
        return tj.margin_loss(d, labels, beta=beta[labels], **options)

    def of_torch(numbers):
        theirs.beta = numbers[96:]
        return theirs(numbers[:96].reshape(16, 6), torch.tensor(labels))

    beta = np.linspace(2.5, 3.5, labels.max() + 1)
    numbers = np.concatenate([embeddings(seed).ravel(), beta])
    assert_same(ours, of_torch, numbers, rtol=1e-8)


# name -> (our loss, our options, their loss, name of their class vectors)
CLASS_VECTORS = {
    "cosface": (tj.cosface_loss, {}, losses.CosFaceLoss, "W"),
    "arcface": (
        tj.arcface_loss,
        {"margin": float(np.radians(28.6))},
        losses.ArcFaceLoss,
        "W",
    ),
    "proxy_anchor": (tj.proxy_anchor_loss, {}, losses.ProxyAnchorLoss, "proxies"),
}


@every_seed
@pytest.mark.parametrize("name", CLASS_VECTORS)
@every_labels_name
def test_losses_of_class_vectors(labels_name, name, seed):
    """Gradients by embeddings and by class vectors, one of which has no embedding."""
    loss, options, theirs, attribute = CLASS_VECTORS[name]
    labels = LABELS[labels_name]
    classes = np.arange(labels.max() + 2)
    module = theirs(num_classes=len(classes), embedding_size=6)

    def ours(both):
        d = tj.cosine(both[:16], both[16:])
        return loss(d, labels, reference_labels=classes, **options)

    def of_torch(both):
        vectors = both[16:].T if attribute == "W" else both[16:]
        module._parameters.pop(attribute, None)
        setattr(module, attribute, vectors)
        return module(both[:16], torch.tensor(labels))

    both = np.concatenate([embeddings(seed), embeddings(9, n=len(classes))])
    assert_same(ours, of_torch, both, rtol=1e-8)


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
