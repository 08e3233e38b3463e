"""Is it any good, ranked: neighbours, and metrics of how early the right ones come.

Every query ranks the references by distance, the nearest first and ties by the lower
index; references with the query's label are relevant. A query is never its own
reference, and one without any relevant reference is left out of the means and counted.

A vector that is not finite cannot be ranked: metrics are NaN of every query that is one
or has one among its references, and so are their means. Padding may hold anything.
"""

from tripletjax.retrieval.evaluation import (
    Reduction,
    RetrievalMetrics,
    evaluate,
    mean_of_classes,
    mean_of_queries,
    recall_at_k,
)
from tripletjax.retrieval.few_shot import few_shot_accuracy
from tripletjax.retrieval.identification import (
    IdentificationMetrics,
    NearestClasses,
    evaluate_identification,
    nearest_classes,
)
from tripletjax.retrieval.neighbors import nearest_neighbors
from tripletjax.retrieval.relevance import (
    ScoreAtTopK,
    score_at_top_k,
    similarity_precision,
)

__all__ = [
    "IdentificationMetrics",
    "NearestClasses",
    "Reduction",
    "RetrievalMetrics",
    "ScoreAtTopK",
    "evaluate",
    "evaluate_identification",
    "few_shot_accuracy",
    "mean_of_classes",
    "mean_of_queries",
    "nearest_classes",
    "nearest_neighbors",
    "recall_at_k",
    "score_at_top_k",
    "similarity_precision",
]
