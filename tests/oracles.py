"""What every loss, miner and metric should be: loops in float64, from the definitions.

Nothing here is vectorised or clever, and nothing imports tripletjax. Masks are boolean
arrays ``[n, m]``, distances float64 ``[n, m]``. Ties go to the lowest index because
``max`` and ``min`` of Python keep the first.
"""

import itertools
import math

import numpy as np

NONE = (0, 0, 0, False)


# Derivatives.


class Dual:
    """A number with its derivatives by many variables, which arithmetic carries along.

    Loops over duals have exact gradients. Comparisons take the number alone.
    """

    __array_ufunc__ = None  # so that numbers of NumPy leave arithmetic to this class

    def __init__(self, value, slopes):
        self.value, self.slopes = float(value), slopes

    def __add__(self, other):
        return Dual(self.value + value_of(other), self.slopes + slopes_of(other))

    def __mul__(self, other):
        slopes = self.slopes * value_of(other) + self.value * slopes_of(other)
        return Dual(self.value * value_of(other), slopes)

    def __neg__(self):
        return Dual(-self.value, -self.slopes)

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __truediv__(self, other):
        ratio = self.value / value_of(other)
        slopes = (self.slopes - ratio * slopes_of(other)) / value_of(other)
        return Dual(ratio, slopes)

    def __rtruediv__(self, other):
        ratio = other / self.value
        return Dual(ratio, -ratio / self.value * self.slopes)

    def __pow__(self, power):
        return Dual(self.value**power, power * self.value ** (power - 1) * self.slopes)

    __radd__, __rmul__ = __add__, __mul__

    def __eq__(self, other):
        return self.value == value_of(other)

    def __lt__(self, other):
        return self.value < value_of(other)

    def __gt__(self, other):
        return self.value > value_of(other)

    def __le__(self, other):
        return self.value <= value_of(other)

    def __ge__(self, other):
        return self.value >= value_of(other)

    def __abs__(self):
        return -self if self.value < 0 else self

    __hash__ = None


def value_of(x):
    """A number without its derivatives."""
    return x.value if isinstance(x, Dual) else float(x)


def slopes_of(x):
    return x.slopes if isinstance(x, Dual) else 0.0


def _with_derivative(function, derivative):
    def apply(x):
        if not isinstance(x, Dual):
            return function(x)
        return Dual(function(x.value), derivative(x.value) * x.slopes)

    return apply


exp = _with_derivative(math.exp, math.exp)
log = _with_derivative(math.log, lambda x: 1 / x)
sqrt = _with_derivative(math.sqrt, lambda x: 0.5 / math.sqrt(x))
sin = _with_derivative(math.sin, math.cos)
cos = _with_derivative(math.cos, lambda x: -math.sin(x))
arccos = _with_derivative(math.acos, lambda x: -1 / math.sqrt((1 - x) * (1 + x)))


def _logistic(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


sigmoid_of = _with_derivative(_logistic, lambda x: _logistic(x) * _logistic(-x))
softplus = _with_derivative(
    lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))),
    lambda x: math.exp(min(x, 0.0)) / (1 + math.exp(-abs(x))),
)


def value_and_gradients(function, *arguments):
    """The value of a function of arrays and numbers, and its gradients by each."""
    arrays = [np.asarray(x, float) for x in arguments]
    ends = np.cumsum([x.size for x in arrays])
    duals = []
    for x, end in zip(arrays, ends):
        each = np.empty(x.size, object)
        for i, number in enumerate(x.ravel()):
            slopes = np.zeros(ends[-1])
            slopes[end - x.size + i] = 1
            each[i] = Dual(number, slopes)
        duals.append(each.reshape(x.shape) if x.ndim else each[0])
    result = function(*duals)
    slopes = np.zeros(ends[-1]) + slopes_of(result)
    parts = np.split(slopes, ends[:-1])
    return value_of(result), [part.reshape(x.shape) for part, x in zip(parts, arrays)]


# Distances of two vectors.


def euclidean(a, b):
    return math.sqrt(squared_euclidean(a, b))


def squared_euclidean(a, b):
    return sum((float(s) - float(t)) ** 2 for s, t in zip(a, b))


def manhattan(a, b):
    return sum(abs(float(s) - float(t)) for s, t in zip(a, b))


def cosine(a, b):
    a, b = ([s if isinstance(s, Dual) else float(s) for s in v] for v in (a, b))
    squares = [sum(s * s for s in v) for v in (a, b)]
    if 0 in squares:
        return 1.0
    product = sum(s * t for s, t in zip(a, b))
    return 1 - product / sqrt(squares[0]) / sqrt(squares[1])


def matrix(distance, x, y=None):
    same = y is None
    y = x if same else y
    return np.array(
        [
            [0.0 if same and i == j else distance(a, b) for j, b in enumerate(y)]
            for i, a in enumerate(x)
        ]
    )


# Pairs.


def pair_masks(
    labels,
    reference_labels=None,
    positions=None,
    where=None,
    reference_where=None,
    match=lambda a, b: a == b,
):
    square = reference_labels is None
    if square:
        reference_labels = labels
        positions = range(len(labels)) if positions is None else positions
        reference_where = where if reference_where is None else reference_where
    n, m = len(labels), len(reference_labels)
    positive, negative = np.zeros((n, m), bool), np.zeros((n, m), bool)
    for i in range(n):
        for j in range(m):
            if positions is not None and positions[i] == j:
                continue
            if where is not None and not where[i]:
                continue
            if reference_where is not None and not reference_where[j]:
                continue
            matched = bool(match(labels[i], reference_labels[j]))
            positive[i, j], negative[i, j] = matched, not matched
    return positive, negative


def ignore_false_negatives(d, positive, negative, margin=None, share=None):
    """The negatives that are not much nearer than the nearest positive."""
    kept = np.zeros_like(negative)
    for a in range(len(d)):
        nearest = min((d[a][p] for p in _of(positive, a)), default=None)
        for n in _of(negative, a):
            kept[a, n] = nearest is None or (
                (margin is None or d[a][n] >= nearest - margin)
                and (share is None or d[a][n] >= nearest - share * abs(1 - nearest))
            )
    return kept


# Mining. Triplets are (anchor, positive, negative, valid).


def _of(mask, anchor):
    return [int(j) for j in np.flatnonzero(mask[anchor])]


def batch_hard(d, positive, negative):
    return easy_hard(d, positive, negative, "hard", "hard")


def easy_hard(d, positive, negative, pos, neg, fallback=False):
    """One triplet per anchor, or None for an anchor without one."""
    triplets = []
    for a in range(len(d)):
        by_distance = lambda j: d[a][j]  # noqa: B023, E731
        ps, ns = _of(positive, a), _of(negative, a)
        if not ps or not ns:
            triplets.append(None)
            continue
        ends = {
            ("p", "easy"): min(ps, key=by_distance),
            ("p", "hard"): max(ps, key=by_distance),
            ("n", "easy"): max(ns, key=by_distance),
            ("n", "hard"): min(ns, key=by_distance),
        }
        p, n = ends.get(("p", pos)), ends.get(("n", neg))
        if neg == "semi-hard":
            beyond = [j for j in ns if d[a][j] > d[a][p]]
            if beyond:
                n = min(beyond, key=by_distance)
            elif fallback:
                n = ends["n", "easy"]
        if pos == "semi-hard":
            within = [j for j in ps if d[a][j] < d[a][n]]
            if within:
                p = max(within, key=by_distance)
            elif fallback:
                p = ends["p", "easy"]
        triplets.append(None if p is None or n is None else (a, p, n))
    return triplets


def semi_hard(d, positive, negative, fallback=True):
    """One negative per (anchor, positive) pair."""
    chosen = {}
    for a in range(len(d)):
        by_distance = lambda j: d[a][j]  # noqa: B023, E731
        ns = _of(negative, a)
        for p in _of(positive, a):
            beyond = [j for j in ns if d[a][j] > d[a][p]]
            if beyond:
                chosen[a, p] = min(beyond, key=by_distance)
            elif ns and fallback:
                chosen[a, p] = max(ns, key=by_distance)
    return chosen


def all_triplets(d, positive, negative, low=-math.inf, high=math.inf):
    return [
        (a, p, n)
        for a in range(len(d))
        for p in _of(positive, a)
        for n in _of(negative, a)
        # Compared as the miner documents it, not by the difference, which rounds.
        if (low == -math.inf or d[a][n] > d[a][p] + low)
        and (high == math.inf or d[a][n] <= d[a][p] + high)
    ]


def within_margin(d, positive, negative, margin):
    """The negatives that random semi-hard mining draws from, per pair."""
    return {
        (a, p): {n for n in _of(negative, a) if d[a][p] < d[a][n] < d[a][p] + margin}
        for a in range(len(d))
        for p in _of(positive, a)
    }


def distance_weights(d, negative, anchor, dim, cutoff, furthest):
    """The probabilities that distance-weighted sampling draws negatives with."""
    weights = {}
    for n in _of(negative, anchor):
        if d[anchor][n] < furthest:
            r = max(d[anchor][n], cutoff)
            weights[n] = 1 / (r ** (dim - 2) * (1 - r * r / 4) ** ((dim - 3) / 2))
    if not weights:
        weights = dict.fromkeys(_of(negative, anchor), 1.0)
    total = sum(weights.values())
    return {n: w / total for n, w in weights.items()}


# Costs: functions of (d_ap, d_an, margin), with their derivatives by the first two.


def hinge(ap, an, margin):
    gap = ap - an + margin
    return (gap, 1.0, -1.0) if gap > 0 else (0.0, 0.0, 0.0)


def soft(ap, an, margin):
    gap = ap - an + margin
    cost = max(gap, 0) + math.log1p(math.exp(-abs(gap)))
    slope = 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0
    return cost, slope, -slope


def selectively_contrastive(ap, an, margin, weight=1.0, temperature=0.1):
    if an < ap:
        return weight * (1 - an), 0.0, -weight
    cost, slope, _ = soft(ap / temperature, an / temperature, 0.0)
    return cost, slope / temperature, -slope / temperature


# Losses: (total, active, valid) per anchor and the gradient of a weighted sum of the
# totals, sum(weights * total), with respect to the distances.


def loss_of(d, triplets, cost, margin, weights=None):
    n, m = d.shape
    weights = np.ones(n) if weights is None else weights
    total, active, valid = np.zeros(n), np.zeros(n), np.zeros(n)
    gradient = np.zeros((n, m))
    for a, p, j in triplets:
        value, by_ap, by_an = cost(d[a][p], d[a][j], margin)
        total[a] += value
        active[a] += value > 0
        valid[a] += 1
        gradient[a, p] += weights[a] * by_ap
        gradient[a, j] += weights[a] * by_an
    return (total, active, valid), gradient


def batch_all_triplets_of(d, positive, negative):
    return all_triplets(d, positive, negative)


def batch_hard_triplets_of(d, positive, negative):
    return [t for t in batch_hard(d, positive, negative) if t]


def semi_hard_triplets_of(d, positive, negative, fallback=True):
    chosen = semi_hard(d, positive, negative, fallback)
    return [(a, p, n) for (a, p), n in chosen.items()]


def mean_valid(terms):
    return terms[0].sum() / max(terms[2].sum(), 1)


def mean_active(terms):
    return terms[0].sum() / max(terms[1].sum(), 1)


def triplet_margin(a, p, n, distance, cost, margin, swap=False):
    """The cost of each explicit triplet."""
    costs = []
    for x, y, z in zip(a, p, n):
        far = min(distance(x, z), distance(y, z)) if swap else distance(x, z)
        costs.append(cost(distance(x, y), far, margin)[0])
    return np.array(costs)


# Retrieval.


def retrieval(x, y, ks, references=None, reference_labels=None, ranks=None):
    """Means over the queries that have a relevant reference.

    `ranks` ``[n, m]`` says which references a query ranks.
    """
    itself = references is None
    references = x if itself else references
    reference_labels = y if itself else reference_labels
    rows = []
    for i, (query, label) in enumerate(zip(x, y)):
        others = [j for j in range(len(references)) if not (itself and i == j)]
        others = [j for j in others if ranks is None or ranks[i][j]]
        others.sort(key=lambda j: (squared_euclidean(query, references[j]), j))
        relevant = [bool(reference_labels[j] == label) for j in others]
        r = sum(relevant)
        if not r:
            continue
        first = relevant.index(True) + 1
        precision = [sum(relevant[: k + 1]) / (k + 1) for k in range(len(relevant))]
        rows.append(
            {
                "recall_at_k": {k: float(first <= k) for k in ks},
                "precision_at_1": float(relevant[0]),
                "r_precision": sum(relevant[:r]) / r,
                "map_at_r": sum(p for p, rel in zip(precision[:r], relevant) if rel)
                / r,
                "mean_average_precision": sum(
                    p for p, rel in zip(precision, relevant) if rel
                )
                / r,
                "mean_reciprocal_rank": 1 / first,
            }
        )
    names = (
        "precision_at_1",
        "r_precision",
        "map_at_r",
        "mean_average_precision",
        "mean_reciprocal_rank",
    )
    means = {name: sum(row[name] for row in rows) / max(len(rows), 1) for name in names}
    recall = {
        k: sum(row["recall_at_k"][k] for row in rows) / max(len(rows), 1) for k in ks
    }
    return means | {"recall_at_k": recall, "queries": len(rows)}


# Verification.


def roc(distances, same):
    """Every threshold with its true and false accept rate, by counting."""
    positives, negatives = sum(same), len(same) - sum(same)
    points = [(-math.inf, 0.0, 0.0)]
    for threshold in sorted(set(distances)):
        accepted = [s for d, s in zip(distances, same) if d <= threshold]
        true = sum(accepted)
        points.append((threshold, true / positives, (len(accepted) - true) / negatives))
    return points


def tar_at_far(distances, same, far):
    return max(true for _, true, false in roc(distances, same) if false <= far)


def equal_error_rate(distances, same):
    points = roc(distances, same)
    for (_, true, false), (_, next_true, next_false) in itertools.pairwise(points):
        start, end = 1 - true - false, 1 - next_true - next_false
        if start >= 0 >= end:
            part = start / (start - end) if start > end else 0.0
            return false + part * (next_false - false)
    raise AssertionError("the ROC ends where all is accepted")


def area_under_roc(distances, same):
    wins = [
        (1.0 if p < n else 0.5 if p == n else 0.0)
        for p, s in zip(distances, same)
        if s
        for n, t in zip(distances, same)
        if not t
    ]
    return sum(wins) / len(wins)


def between(distances, last):
    """The middle between an accepted distance and the next, if there is one."""
    beyond = [d for d in distances if d > last]
    return (last + min(beyond)) / 2 if beyond and last >= 0 else last


def best_threshold(distances, same):
    """The largest share decided rightly, and the least distance that does it."""
    best, at = -1.0, None
    for threshold in [-1.0, *sorted(d for d, s in zip(distances, same) if s)]:
        right = sum((d <= threshold) == s for d, s in zip(distances, same))
        if right / len(same) > best:
            best, at = right / len(same), threshold
    return best, at


def k_fold(distances, same, fold, folds):
    accuracies = []
    for k in range(folds):
        train = [(d, s) for d, s, f in zip(distances, same, fold) if f != k]
        _, last = best_threshold(*zip(*train))
        beyond = [d for d, _ in train if d > last]
        low = 0.0 if last < 0 else last
        threshold = (low + min(beyond)) / 2 if beyond else last
        test = [(d, s) for d, s, f in zip(distances, same, fold) if f == k]
        accuracies.append(sum((d <= threshold) == s for d, s in test) / len(test))
    return accuracies


def class_order(distances, labels, real):
    """Classes by their nearest reference, each with its distance and place."""
    order, seen = [], set()
    for j in sorted(range(len(labels)), key=lambda j: (distances[j], j)):
        if real[j] and labels[j] not in seen:
            seen.add(labels[j])
            order.append((labels[j], distances[j], j))
    return order


def identification(d, labels, reference_labels, where, reference_where, ranks, fpirs):
    """Identification rates, and FNIR with the best threshold of each FPIR."""
    gallery = {c for c, real in zip(reference_labels, reference_where) if real}
    orders = [class_order(row, reference_labels, reference_where) for row in d]
    queries = [i for i, real in enumerate(where) if real]
    known = [i for i in queries if labels[i] in gallery]
    unknown = [i for i in queries if labels[i] not in gallery]
    rates = [
        sum(labels[i] in [c for c, *_ in orders[i][:rank]] for i in known) / len(known)
        for rank in ranks
    ]
    fnirs = []
    for fpir in fpirs:
        best = math.nan
        for threshold in [-1.0, *(orders[i][0][1] for i in queries)]:
            named = sum(orders[i][0][1] <= threshold for i in unknown)
            if named / len(unknown) > fpir:
                continue
            missed = sum(
                orders[i][0][0] != labels[i] or orders[i][0][1] > threshold
                for i in known
            )
            best = (
                min(best, missed / len(known)) if best == best else missed / len(known)
            )
        fnirs.append(best)
    return rates, fnirs


def similarity_precision(d, triplets):
    return sum(d[a][p] < d[a][n] for a, p, n in triplets) / len(triplets)


def score_at_top_k(d, triplets, k, groups):
    """Right less wrong of triplets with an image among the k nearest of the group."""
    score = count = 0
    for a, p, n in triplets:
        pool = [j for j in range(len(d)) if j != a and groups[j] == groups[a]]
        nearest = sorted(pool, key=lambda j, a=a: (d[a][j], j))[:k]
        if p in nearest or n in nearest:
            count += 1
            score += 1 if d[a][p] < d[a][n] else -1
    return score, count


def relevance_probabilities(r, categories, cap, gap, out_of_category):
    """The chance of every triplet, by place."""
    n = len(r)

    def shares(weights):
        total = sum(weights.values())
        return {j: w / total for j, w in weights.items() if w > 0}

    others = {
        i: [j for j in range(n) if j != i and categories[j] == categories[i]]
        for i in range(n)
    }
    anchors = shares({i: sum(r[i][j] for j in others[i]) for i in range(n)})
    chances = {}
    for a, of_anchor in anchors.items():
        capped = {j: min(cap, r[a][j]) for j in others[a]}
        for p, of_positive in shares(capped).items():
            inside = {
                j: w
                for j, w in capped.items()
                if r[a][p] - r[a][j] >= gap and r[a][p] > r[a][j] and w > 0
            }
            outside = {j: 1.0 for j in range(n) if categories[j] != categories[a]}
            out = out_of_category if inside and outside else float(bool(outside))
            for part, of in ((1 - out, inside), (out, outside)):
                for j, share in shares(of).items() if of and part else ():
                    chances[a, p, j] = of_anchor * of_positive * part * share
    return chances


# Losses of pairs, which return the value that the papers average over a batch.


def log_sum_exp(values):
    largest = value_of(max(values, default=-math.inf))
    if largest == -math.inf:
        return -math.inf
    return largest + log(sum(exp(v - largest) for v in values))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def log_sum_exp_costs(d, positive, negative, logit, cost):
    """The costs of a function of positives' distances and negatives' log-sum-exp."""
    return [
        cost(
            [d[a][p] for p in _of(positive, a)],
            log_sum_exp([logit(d[a][n]) for n in _of(negative, a)]),
        )
        for a in range(len(d))
    ]


def separable_costs(d, positive, negative, positive_cost, negative_cost):
    """The costs of all positive pairs and of all negative pairs of each anchor."""
    return [
        (
            [positive_cost(d[a][p]) for p in _of(positive, a)],
            [negative_cost(d[a][n]) for n in _of(negative, a)],
        )
        for a in range(len(d))
    ]


def supcon(d, positive, negative, temperature=0.1):
    """Khosla et al. 2020, equation 2."""
    costs = []
    for a in range(len(d)):
        ps = [-d[a][p] / temperature for p in _of(positive, a)]
        ns = [-d[a][n] / temperature for n in _of(negative, a)]
        if ps:
            of_ps, of_ns = log_sum_exp(ps), log_sum_exp(ns)
            # The log-sum-exp of all, without cancellation.
            costs.append(softplus(of_ns - of_ps) + mean(of_ps - z for z in ps))
    return mean(costs)


def nt_xent(d, positive, negative, temperature=0.1):
    """Chen et al. 2020, equation 1, whose denominator is one pair and negatives."""
    costs = []
    for a in range(len(d)):
        logits = [-d[a][n] / temperature for n in _of(negative, a)]
        for p in _of(positive, a):
            z = -d[a][p] / temperature
            costs.append(softplus(log_sum_exp(logits) - z))
    return mean(costs)


def decoupled_contrastive(d, positive, negative, temperature=0.1):
    """Yeh et al. 2021, equation 6: without the positive in the denominator."""
    costs = []
    for a in range(len(d)):
        logits = [-d[a][n] / temperature for n in _of(negative, a)]
        if logits:
            costs += [
                d[a][p] / temperature + log_sum_exp(logits) for p in _of(positive, a)
            ]
    return mean(costs)


def nca(d, positive, negative, temperature=0.1):
    """Goldberger et al. 2004, the logarithm of the probability of a positive."""
    costs = []
    for a in range(len(d)):
        ps = [-d[a][p] / temperature for p in _of(positive, a)]
        ns = [-d[a][n] / temperature for n in _of(negative, a)]
        if ps:
            costs.append(softplus(log_sum_exp(ns) - log_sum_exp(ps)))
    return mean(costs)


def info_nce(d, positive, negative, temperature=0.05, symmetric=False):
    """van den Oord et al. 2018, equation 4; Radford et al. 2021, figure 3."""
    value = nt_xent(d, positive, negative, temperature)
    if not symmetric:
        return value
    return mean([value, nt_xent(d.T, positive.T, negative.T, temperature)])


def multi_similarity(
    d, positive, negative, alpha=2.0, beta=50.0, base=0.5, epsilon=None
):
    """Wang et al. 2019, equations 11 to 15."""
    costs = []
    for a in range(len(d)):
        ps = [1 - d[a][p] for p in _of(positive, a)]
        ns = [1 - d[a][n] for n in _of(negative, a)]
        if not ps and not ns:
            continue
        if epsilon is not None:
            hardest = min(ps, default=math.inf)
            nearest = max(ns, default=-math.inf)
            ps = [s for s in ps if s - epsilon < nearest]
            ns = [s for s in ns if s + epsilon > hardest]
        costs.append(
            softplus(log_sum_exp([-alpha * (s - base) for s in ps])) / alpha
            + softplus(log_sum_exp([beta * (s - base) for s in ns])) / beta
        )
    return mean(costs)


def circle(d, positive, negative, margin=0.4, scale=80.0):
    """Sun et al. 2020, equations 6 to 8; the weights have no gradient."""

    def weight(x):
        return max(value_of(x), 0)

    costs = []
    for a in range(len(d)):
        ps, ns = _of(positive, a), _of(negative, a)
        of_ps = [
            -scale * weight(margin + d[a][p]) * (1 - d[a][p] - (1 - margin)) for p in ps
        ]
        of_ns = [
            scale * weight(1 - d[a][n] + margin) * (1 - d[a][n] - margin) for n in ns
        ]
        if ps and ns:
            costs.append(softplus(log_sum_exp(of_ps) + log_sum_exp(of_ns)))
    return mean(costs)


def generalized_lifted_structure(d, positive, negative, margin=1.0):
    """Hermans et al. 2017, equation 10."""
    costs = []
    for a in range(len(d)):
        ps = [d[a][p] for p in _of(positive, a)]
        ns = [margin - d[a][n] for n in _of(negative, a)]
        if ps and ns:
            costs.append(max(0.0, log_sum_exp(ps) + log_sum_exp(ns)))
    return mean(costs)


def _class_softmax(d, positive, negative, scale, with_margin):
    costs = []
    for a in range(len(d)):
        ps = [1 - d[a][p] for p in _of(positive, a)]
        if ps:
            own = scale * with_margin(max(ps))
            others = [scale * (1 - d[a][n]) for n in _of(negative, a)]
            costs.append(softplus(log_sum_exp(others) - own))
    return mean(costs)


def cosface(d, positive, negative, margin=0.35, scale=64.0):
    """Wang et al. 2018, equation 4."""
    return _class_softmax(d, positive, negative, scale, lambda s: s - margin)


def arcface(d, positive, negative, margin=0.5, scale=64.0):
    """Deng et al. 2018, equation 3, and the continuation of its authors' code."""

    def with_margin(s):
        angle = arccos(min(max(s, -1.0), 1.0))
        if angle < math.pi - margin:
            return cos(angle + margin)
        return s - margin * sin(margin)

    return _class_softmax(d, positive, negative, scale, with_margin)


def proxy_anchor(d, positive, negative, margin=0.1, scale=32.0):
    """Kim et al. 2020, equation 4; class vectors are the columns."""
    of_positives, of_negatives = [], []
    for c in range(d.shape[1]):
        ps = [1 - d[i][c] for i in range(len(d)) if positive[i][c]]
        ns = [1 - d[i][c] for i in range(len(d)) if negative[i][c]]
        if ps:
            logits = [-scale * (s - margin) for s in ps]
            of_positives.append(softplus(log_sum_exp(logits)))
        if ps or ns:
            logits = [scale * (s + margin) for s in ns]
            of_negatives.append(softplus(log_sum_exp(logits)))
    return mean(of_positives) + mean(of_negatives)


def contrastive(d, positive, negative, positive_margin=0.0, negative_margin=1.0):
    """Hadsell et al. 2006 with hinges instead of squares, each side averaged."""
    of_positives, of_negatives = [], []
    for a in range(len(d)):
        of_positives += [d[a][p] - positive_margin for p in _of(positive, a)]
        of_negatives += [negative_margin - d[a][n] for n in _of(negative, a)]
    return mean(c for c in of_positives if c > 0) + mean(
        c for c in of_negatives if c > 0
    )


def margin(d, positive, negative, margin=0.2, beta=1.2):
    """Wu et al. 2017, equation 4, over the pairs that cost anything.

    `beta` is a number, or one for each anchor.
    """
    costs = []
    for a in range(len(d)):
        own = beta[a] if np.ndim(beta) else beta
        costs += [margin + d[a][p] - own for p in _of(positive, a)]
        costs += [margin + own - d[a][n] for n in _of(negative, a)]
    return mean(c for c in costs if c > 0)


def sigmoid(d, positive, negative, scale=10.0, bias=-10.0):
    """Zhai et al. 2023, algorithm 1."""
    total, anchors = 0.0, 0
    for a in range(len(d)):
        ps, ns = _of(positive, a), _of(negative, a)
        total += sum(softplus(-(scale * (1 - d[a][p]) + bias)) for p in ps)
        total += sum(softplus(scale * (1 - d[a][n]) + bias) for n in ns)
        anchors += bool(ps or ns)
    return total / max(anchors, 1)


def smooth_ap(d, positive, negative, temperature=0.01, include_anchor=True):
    """Brown et al. 2020, equations 4 to 6, of similarities -d."""
    costs = []
    for a in range(len(d)):
        ps, ns = ([d[a][j] for j in _of(mask, a)] for mask in (positive, negative))
        if not ps:
            continue
        if include_anchor:
            ps.append(0.0)
        shares = []
        for i, own in enumerate(ps):
            rank_among_positives = 1 + sum(
                sigmoid_of((own - p) / temperature) for j, p in enumerate(ps) if j != i
            )
            ahead = sum(sigmoid_of((own - n) / temperature) for n in ns)
            shares.append(rank_among_positives / (rank_among_positives + ahead))
        costs.append(1 - mean(shares))
    return mean(costs)


# Hard examples of a whole data set.


def hard_examples(
    d,
    positive,
    negative,
    k,
    *,
    of_positives=False,
    range_min=0,
    range_max=None,
    margin=None,
    relative=None,
    farthest=False,
):
    """Indices and exclusions of each anchor, by sorting all its candidates.

    `relative` is a function of the positive's distance: how much farther negatives
    must be.
    """
    results = []
    for a in range(len(d)):
        candidates = (positive if of_positives else negative)[a]
        candidates = [j for j in range(len(d[a])) if candidates[j]]
        finite = [j for j in candidates if math.isfinite(d[a][j])]
        ranked = [j for j in finite if d[a][j] > 0]
        ranked.sort(key=lambda j: (-d[a][j] if of_positives else d[a][j], j))
        own = [
            d[a][p]
            for p in range(len(d[a]))
            if positive[a][p] and math.isfinite(d[a][p]) and d[a][p] > 0
        ]
        thresholds = [-math.inf, -math.inf]
        if own:
            d_ap = max(own) if farthest else min(own)
            if margin is not None:
                thresholds[0] = d_ap + margin
            if relative is not None:
                thresholds[1] = d_ap + relative(d_ap)
        counts = {
            "not_finite": len(candidates) - len(finite),
            "duplicates": len(finite) - len(ranked),
            "margin": 0,
            "relative_margin": 0,
            "range_min": 0,
            "range_max": 0,
        }
        left = []
        for rank, j in enumerate(ranked):
            if d[a][j] < thresholds[0]:
                counts["margin"] += 1
            elif d[a][j] < thresholds[1]:
                counts["relative_margin"] += 1
            elif rank < range_min:
                counts["range_min"] += 1
            elif range_max is not None and rank >= range_max:
                counts["range_max"] += 1
            else:
                left.append(j)
        results.append((left[:k], counts, left))
    return results


# Re-ranking.


def k_reciprocal(d, k1, k2, distance_weight):
    """Distances of Zhong et al. (2017) among all items, from a distance matrix."""
    items = range(len(d))

    def nearest(p, k):
        """The item and its k nearest others."""
        others = sorted((j for j in items if j != p), key=lambda j: (d[p][j], j))
        return [p, *others[:k]]

    def reciprocal(p, k):
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    encodings = []
    for p in items:
        own = reciprocal(p, k1)
        expanded = set(own)
        for q in own:
            theirs = reciprocal(q, max(k1 // 2, 1))
            if 3 * len(own & theirs) >= 2 * len(theirs):
                expanded |= theirs
        encodings.append([math.exp(-d[p][j]) if j in expanded else 0 for j in items])
    means = []
    for p in items:
        near = nearest(p, k2 - 1)
        means.append([sum(encodings[q][j] for q in near) / len(near) for j in items])
    result = np.zeros((len(d), len(d)))
    for p, q in itertools.product(items, items):
        shared = sum(map(min, means[p], means[q]))
        jaccard = 1 - shared / sum(map(max, means[p], means[q]))
        result[p, q] = (1 - distance_weight) * jaccard + distance_weight * d[p][q]
    return result


def expanded_query(q, references, k, alpha):
    """Radenović et al. (2018): the weighted mean of a query and its k nearest."""

    def unit(v):
        norm = math.sqrt(sum(float(s) ** 2 for s in v))
        return [float(s) / norm for s in v]

    q, references = unit(q), [unit(r) for r in references]
    similarities = [sum(s * t for s, t in zip(q, r)) for r in references]
    order = sorted(range(len(references)), key=lambda j: (-similarities[j], j))[:k]
    total = list(q)
    for j in order:
        weight = max(similarities[j], 0) ** alpha
        total = [s + weight * t for s, t in zip(total, references[j])]
    return unit(total)


# Groups against classes.


def clustering(labels, groups, copies=None):
    """BCubed and pairwise precision and recall, and the adjusted Rand index, by pairs.

    `copies` is the number of copies of each class. Pairs of two copies of one class
    are left out.
    """
    items = [
        (label, copy, group)
        for label, group in zip(labels, groups)
        for copy in range(1 if copies is None else copies[label])
    ]
    counts = {(one, two): 0 for one in (True, False) for two in (True, False)}
    precisions, recalls = [], []
    for i, (label, copy, group) in enumerate(items):
        both = in_group = in_class = 0
        for j, (label_j, copy_j, group_j) in enumerate(items):
            if label == label_j and copy != copy_j:
                continue
            same, together = label == label_j, group == group_j
            both += same and together
            in_group += together
            in_class += same
            if i < j:
                counts[same, together] += 1
        precisions.append(both / in_group)
        recalls.append(both / in_class)
    true, false = counts[True, True], counts[False, True]
    missed, rest = counts[True, False], counts[False, False]
    index = 1.0
    if false or missed:
        index = 2 * (true * rest - missed * false)
        index /= (true + missed) * (missed + rest) + (true + false) * (false + rest)
    return {
        "bcubed_precision": sum(precisions) / len(precisions),
        "bcubed_recall": sum(recalls) / len(recalls),
        "pairwise_precision": true / (true + false) if true + false else math.nan,
        "pairwise_recall": true / (true + missed) if true + missed else math.nan,
        "adjusted_rand_index": index,
    }
