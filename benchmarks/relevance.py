"""Order of classes and of groups of classes, after training by folders.

    python benchmarks/relevance.py --data FOLDER

FOLDER has folders of classes in folders, such as Omniglot's alphabets of characters.
One run learns the classes alone, one by ``--relevance folders``; both are measured on
whole classes that are held out.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn import choices
from tripletjax.learn.data import datasets, hierarchy
from tripletjax.learn.embedder import load_embedder

TRIPLETS, K = 20_000, 30


def drawn(labels: np.ndarray, groups: np.ndarray, of_groups: bool) -> np.ndarray:
    """Triplets whose negative shares less with the query than the positive does.

    Of groups, the positive is of another class of the query's group, and the negative
    of another group; else these are of its class, and of another of its group.
    """
    draw = np.random.default_rng(0)
    made = []
    while sum(map(len, made)) < TRIPLETS:
        a, p, n = draw.integers(0, len(labels), (3, 20 * TRIPLETS))
        same = (labels[a] == labels[p]) & (a != p)
        near, far = groups[a] == groups[p], groups[a] != groups[n]
        if of_groups:
            good = near & (labels[a] != labels[p]) & far
        else:
            good = same & ~far & (labels[a] != labels[n])
        made.append(np.stack([a, p, n], axis=1)[good])
    return np.concatenate(made)[:TRIPLETS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--relevance", nargs="+", default=choices.RELEVANCE)
    arguments = parser.parse_args()
    dataset = datasets.load(arguments.data, split="classes")
    test, levels = dataset.test, hierarchy.levels_of(dataset.label_names)
    labels, groups = test.labels, levels[0][test.labels]
    print(f"{len(labels):,} images of {len(np.unique(labels)):,} classes held out, of")
    print(
        f"{len(np.unique(groups))} groups; in %, but score@{K} of {TRIPLETS:,} triplets"
    )
    rows = [drawn(labels, groups, of_groups) for of_groups in (False, True)]
    print("| relevance | MAP@R | classes in order | groups in order | score@30 |")
    print("|---|---|---|---|---|")
    for relevance in arguments.relevance:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "run"
            learn.run(
                learn.Config(
                    data=arguments.data,
                    split="classes",
                    relevance=relevance,
                    steps=arguments.steps,
                ),
                out,
            )
            x = np.asarray(load_embedder(out).of_shape(test.images[:]))
        found = tj.retrieval.evaluate(x, labels)
        order = [100 * tj.retrieval.similarity_precision(x, t) for t in rows]
        both = np.concatenate([t[: TRIPLETS // 2] for t in rows])
        score = tj.retrieval.score_at_top_k(x, both, k=K)
        print(
            f"| {relevance} | {100 * found.map_at_r:.1f} | {order[0]:.1f} | "
            f"{order[1]:.1f} | {score.score:.0f} of {score.count} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
