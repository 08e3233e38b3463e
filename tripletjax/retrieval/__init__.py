"""Retrieval: neighbours, re-ranking, metrics, few-shot accuracy, identification.

Every query ranks the references by distance, the nearest first and ties by the lower
index. References with the query's label are relevant. A query is never its own
reference. The means leave out queries without a relevant reference, and `queries`
counts the rest.

A vector that is not finite has no rank. If a query or one of its references is not
finite, the metrics of the query are NaN, and so are their means. Padding may have any
value.
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
from tripletjax.retrieval.reranking import expand_queries, k_reciprocal_distances

__all__ = [
    "IdentificationMetrics",
    "NearestClasses",
    "Reduction",
    "RetrievalMetrics",
    "ScoreAtTopK",
    "evaluate",
    "evaluate_identification",
    "expand_queries",
    "few_shot_accuracy",
    "k_reciprocal_distances",
    "mean_of_classes",
    "mean_of_queries",
    "nearest_classes",
    "nearest_neighbors",
    "recall_at_k",
    "score_at_top_k",
    "similarity_precision",
]
