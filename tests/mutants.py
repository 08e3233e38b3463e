"""Mutation tests: each mutant changes one line of the library, and a test must fail.

``.ci/run --full`` runs this script; pytest does not collect it. By hand::

    python tests/mutants.py --jobs 2 --table mutants.md
    python tests/mutants.py --hinted --only far-tie loss-swap

Every mutant gets its own copy of the tree. The tests most likely to fail run first. If
all of them pass, the whole quick lane runs, and with ``--lane ci`` the slow tests too.
A mutant is killed if a test fails, or if the tests run longer than their limit.

Exit status: 0 if quick tests kill 95 % of the mutants and, with ``--lane ci``, slow
tests kill the rest; 1 if not; 2 if the list or a test run is broken.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Share of all mutants that the quick lane, and with it the slow tests, must kill.
QUICK_SHARE, CI_SHARE = 0.95, 1.0
# Minutes after which a run of the hinted tests, or of a lane, is stopped.
HINTED_MINUTES, LANE_MINUTES = 15, 90
# Exit statuses of pytest.
PASSED, FAILED = 0, 1
SLOW = ("-m", "slow and not full")
# Processes of pytest, to be stopped with this one.
RUNNING: set[subprocess.Popen] = set()


class Mutant(NamedTuple):
    """One wrong line of the library.

    Attributes:
        name: a short name, for `--only`.
        file: the file to change, within ``tripletjax``.
        old: text of one line that occurs once in the file.
        new: the text that replaces it.
        fault: the wrong behaviour that a user would see.
        tests: files or node ids of the tests most likely to fail, separated by spaces.
    """

    name: str
    file: str
    old: str
    new: str
    fault: str
    tests: str

    @property
    def path(self) -> Path:
        return Path("tripletjax") / self.file


MUTANTS = [
    # Distances.
    Mutant(
        "distance-root-slope",
        "distances.py",
        "return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))",
        "return jnp.sqrt(x)",
        "the gradient at distance 0 is NaN",
        "tests/test_distances.py::test_zero_distance_has_zero_gradient",
    ),
    Mutant(
        "distance-diagonal",
        "distances.py",
        "return jnp.where(jnp.arange(len(y)) == own_index[:, None], 0, matrix(x, y))",
        "return matrix(x, y)",
        "rounding errors on the diagonal",
        "tests/test_distances.py::test_diagonal_is_exactly_zero_and_flat",
    ),
    Mutant(
        "distance-offset",
        "distances.py",
        "return jnp.where(common & jnp.isfinite(squares), rounded, 0)",
        "return jnp.zeros_like(rounded)",
        "a common offset costs digits",
        "tests/test_distances.py::test_a_common_offset_costs_no_digits",
    ),
    Mutant(
        "distance-half-precision",
        "distances.py",
        "dtype = jnp.result_type(*arrays, jnp.float32)",
        "dtype = jnp.result_type(*arrays, jnp.bfloat16)",
        "bfloat16 vectors are computed in bfloat16",
        "tests/test_distances.py::test_low_precision_is_computed_in_float32",
    ),
    Mutant(
        "distance-negative-square",
        "distances.py",
        "return self.distance(jnp.where(squares < 0, 0, squares))",
        "return self.distance(squares)",
        "the root of a rounding error is NaN",
        "tests/test_distances.py::test_equal_vectors_of_two_sets_are_near",
    ),
    Mutant(
        "cosine-zero-vector",
        "distances.py",
        "return jnp.where(jnp.max(jnp.abs(x), axis=-1) == 0, 0.5, 0).astype(x.dtype)",
        "return _nothing(x)",
        "a zero vector is at distance 0.5 from all",
        "tests/test_distances.py::test_zero_vectors_have_no_direction",
    ),
    Mutant(
        "manhattan-slope",
        "distances.py",
        "return jnp.sum(jnp.where(difference == 0, 0, jnp.abs(difference)), axis=-1)",
        "return jnp.sum(jnp.abs(difference), axis=-1)",
        "the gradient of equal coordinates is 1",
        "tests/test_distances.py::test_zero_distance_has_zero_gradient",
    ),
    # Pairs.
    Mutant(
        "pairs-own-positive",
        "pairs.py",
        "itself = jnp.eye(n, m, dtype=bool) & square",
        "itself = jnp.zeros((n, m), bool)",
        "an anchor is its own positive",
        "tests/test_pairs.py::test_masks_are_the_definition",
    ),
    Mutant(
        "pairs-own-negative",
        "pairs.py",
        "return PairMasks(same & ~itself, ~same & ~itself)",
        "return PairMasks(same & ~itself, ~same)",
        "an anchor is its own negative where labels differ",
        "tests/test_pairs.py::test_masks_are_the_definition",
    ),
    Mutant(
        "pairs-signed-labels",
        "pairs.py",
        "same &= (left < 0) == (right < 0)",
        "same &= True",
        "labels -1 and 255 match",
        "tests/test_pairs.py::test_signed_and_unsigned_labels_differ_by_value",
    ),
    Mutant(
        "pairs-padded-references",
        "pairs.py",
        "        elif reference_where is None:",
        "        elif False:",
        "padding counts as a reference",
        "tests/test_contract.py",
    ),
    # Mining.
    Mutant(
        "mining-saturation",
        "mining.py",
        "return jnp.where(a > most - b, most, a + b)",
        "return a + b",
        "counts of more than 2**31 triplets are negative",
        "tests/test_mining.py::test_sums_beyond_the_integers_stop_there",
    ),
    Mutant(
        "mining-farthest-mask",
        "mining.py",
        "index = jnp.argmax(jnp.where(mask, distances, -jnp.inf), axis=-1)",
        "index = jnp.argmax(distances, axis=-1)",
        "the farthest positive may be a negative",
        "tests/test_mining.py::test_batch_hard_by_hand",
    ),
    Mutant(
        "mining-nearest-tie",
        "mining.py",
        "index = jnp.argmin(jnp.where(mask, distances, jnp.inf), axis=-1)",
        (
            "index = mask.shape[-1] - 1 - jnp.argmin(jnp.where(mask, distances, "
            "jnp.inf)[..., ::-1], axis=-1)"
        ),
        "the last of equally near negatives is mined",
        "tests/test_mining.py::test_the_lowest_index_wins_ties",
    ),
    Mutant(
        "mining-beyond-few",
        "mining.py",
        "beyond = key > take(bits, column[..., None])",
        "beyond = key >= take(bits, column[..., None])",
        "a semi-hard negative is as near as the positive (few positives)",
        "tests/test_mining.py::test_semi_hard_either_way",
    ),
    Mutant(
        "mining-beyond-all",
        "mining.py",
        'beyond = negatives.rank(distances, side="right")',
        'beyond = negatives.rank(distances, side="left")',
        "a semi-hard negative is as near as the positive (many positives)",
        "tests/test_mining.py::test_semi_hard_either_way",
    ),
    Mutant(
        "mining-fallback",
        "mining.py",
        "exists |= has_negative[..., None] & (fallback | jnp.isnan(distances))",
        "exists |= has_negative[..., None]",
        "fallback=False falls back",
        "tests/test_mining.py::test_semi_hard_by_hand",
    ),
    Mutant(
        "mining-relative-lax",
        "mining.py",
        "return _nearest(distances, candidates & ~(distances <= other[..., None]))",
        "return _nearest(distances, candidates & ~(distances < other[..., None]))",
        "semi_hard_negative takes a negative as near as the positive",
        "tests/test_mining.py::test_a_semi_hard_choice_is_strict",
    ),
    Mutant(
        "mining-weight-sign",
        "mining.py",
        "log_weights = jnp.where(drawn, -log_density, -jnp.inf)",
        "log_weights = jnp.where(drawn, log_density, -jnp.inf)",
        "frequent distances are drawn more often",
        "tests/test_mining.py::test_distance_weighted_draws_by_weight",
    ),
    Mutant(
        "mining-random-rank",
        "mining.py",
        'column = jnp.searchsorted(running, rank, side="right")',
        'column = jnp.searchsorted(running, rank, side="left")',
        "random triplets of masks take the wrong columns",
        "tests/test_mining.py::test_random_triplets_are_uniform",
    ),
    Mutant(
        "weights-rounded",
        "_matrices.py",
        "running = jax.lax.cummax(running, axis=running.ndim - 1)",
        "running = jnp.cumsum(scaled, axis=-1)",
        "a draw by weight takes columns whose weight is 0",
        "tests/test_mining.py::test_no_column_without_weight_is_drawn",
    ),
    Mutant(
        "mining-within-margin",
        "mining.py",
        'last = negatives.rank(distances + margin, side="left")',
        'last = negatives.rank(distances + margin, side="right")',
        "a random semi-hard negative lies on the margin",
        "tests/test_mining.py::test_the_ends_of_bands",
    ),
    Mutant(
        "mining-band-low",
        "mining.py",
        'first = negatives.rank(distances + band.low, side="right")',
        'first = negatives.rank(distances + band.low, side="left")',
        "the lower end of a band is included",
        "tests/test_mining.py::test_the_ends_of_bands",
    ),
    # Losses.
    Mutant(
        "loss-mean-valid",
        "losses.py",
        "return sums.total / jnp.maximum(sums.valid, 1)",
        "return sums.total / jnp.maximum(sums.active, 1)",
        "mean_valid divides by active triplets",
        "tests/test_losses.py::test_reductions",
    ),
    Mutant(
        "loss-swap",
        "losses.py",
        "d_an = jnp.where(d_pn < d_an, d_pn, d_an)",
        "d_an = jnp.where(d_pn > d_an, d_pn, d_an)",
        "swap takes the farther negative",
        "tests/test_losses.py::test_explicit_triplets",
    ),
    Mutant(
        "loss-margin-sign",
        "losses.py",
        "costs = cost.function(d_ap - d_an + margin)",
        "costs = cost.function(d_ap - d_an - margin)",
        "the margin is subtracted",
        "tests/test_losses.py::test_explicit_triplets",
    ),
    Mutant(
        "loss-masked-cost",
        "losses.py",
        "return jnp.where(valid, costs, 0)",
        "return costs",
        "a triplet that is not valid costs the margin",
        "tests/test_losses.py::test_masked_triplets_may_hold_anything",
    ),
    Mutant(
        "loss-contrastive-side",
        "losses.py",
        "return jnp.where(d_an < d_ap, hard_weight * (1 - d_an), contrast)",
        "return jnp.where(d_an > d_ap, hard_weight * (1 - d_an), contrast)",
        "selectively_contrastive pushes easy negatives alone",
        "tests/test_losses.py::test_selectively_contrastive_only_pushes_hard_negatives",
    ),
    Mutant(
        "loss-margin-gradient",
        "losses.py",
        (
            "total_dot = jnp.sum(weights * distances_dot, axis=-1) + margin_weights * "
            "margins_dot"
        ),
        "total_dot = jnp.sum(weights * distances_dot, axis=-1) + 0 * margins_dot",
        "batch_all_loss has no gradient by the margin",
        "tests/test_losses.py::test_the_slope_by_the_margin_counts_active_triplets",
    ),
    Mutant(
        "loss-negative-index",
        "losses.py",
        "return jnp.where(index < 0, jnp.asarray(limit, index.dtype), index)",
        "return index",
        "a negative index wraps around",
        "tests/test_losses.py::test_triplets_that_are_not_there_are_named_or_give_nan",
    ),
    Mutant(
        "loss-hinge-shape",
        "losses.py",
        "if shape == gaps.shape:",
        "if shape is not None:",
        "a hinge that is not elementwise is accepted",
        "tests/test_losses.py::test_bad_explicit_triplets_are_named",
    ),
    # Blocks of pairs.
    Mutant(
        "batch-padding-vectors",
        "_pairwise/batch.py",
        "return x if where is None else jnp.where(where[..., None], x, 0)",
        "return x",
        "a NaN in padding reaches the result",
        "tests/test_retrieval.py::test_padding",
    ),
    Mutant(
        "batch-device-rows",
        "_pairwise/batch.py",
        "positions += lax.axis_index(axis_name) * n",
        "positions += lax.axis_index(axis_name) * 0",
        "on a mesh an anchor is its own positive",
        "tests/test_engine.py::test_references_that_go_round_four_devices",
    ),
    Mutant(
        "class-own-rank",
        "_pairwise/class_index.py",
        "slot = jnp.minimum(first + r + (r >= rank), len(self.order) - 1)",
        "slot = jnp.minimum(first + r + (r > rank), len(self.order) - 1)",
        "an anchor is its own positive, by blocks",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "class-own-negative",
        "_pairwise/class_index.py",
        "negatives = size - class_size - (in_references & ~matches)",
        "negatives = size - class_size",
        "an anchor counts as its own negative",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "class-own-draw",
        "_pairwise/class_index.py",
        "slot = r + ((own < first) & (r >= own))",
        "slot = r",
        "a random negative is the anchor itself",
        "tests/test_mining.py::test_random_triplets_are_uniform",
    ),
    Mutant(
        "class-padded-anchors",
        "_pairwise/class_index.py",
        "positives, negatives = positives * where, negatives * where",
        "positives, negatives = positives * 1, negatives * 1",
        "padding has triplets",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "class-padding-order",
        "_pairwise/class_index.py",
        "ordered = jnp.where(index < size, ordered, last)",
        "ordered = jnp.where(index < m, ordered, last)",
        "labels of padding disturb the search for a class",
        "tests/test_engine.py::test_classes_among_padding",
    ),
    Mutant(
        "blocks-overlap",
        "_pairwise/slices.py",
        "return self.start(block) + jnp.arange(self.size) >= block * self.size",
        "return self.start(block) + jnp.arange(self.size) >= 0",
        "rows of overlapping blocks count twice",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tile-positives",
        "_pairwise/tiles.py",
        "squares = jnp.where(masks.negative, squares, jnp.inf)",
        "squares = jnp.where(masks.negative | masks.positive, squares, jnp.inf)",
        "positives count as negatives",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tile-pairs-twice",
        "_pairwise/tiles.py",
        "counts = jnp.triu(counts, 1)",
        "counts = counts & True",
        "pairs within a tile count twice",
        "tests/test_verification.py::test_all_pairs",
    ),
    Mutant(
        "tile-cancellation",
        "_pairwise/tiles.py",
        "near = counts & (squares < CANCELLATION_SHARE * _scale(parts))",
        "near = counts & (squares < 0 * _scale(parts))",
        "distances of near duplicates are noise",
        "tests/test_verification.py::test_near_duplicates_keep_their_order",
    ),
    Mutant(
        "tile-device-share",
        "_pairwise/tiles.py",
        "index = i * devices + me",
        "index = i * devices",
        "all devices go over the same tiles",
        "tests/test_verification.py::test_devices_go_over_different_pairs",
    ),
    Mutant(
        "mesh-terms-place",
        "_pairwise/mesh.py",
        "start = lax.axis_index(axis_name) * n",
        "start = lax.axis_index(axis_name) * 0",
        "gathered terms of devices lie on one another",
        "tests/test_verification.py::test_devices_go_over_different_pairs",
    ),
    Mutant(
        "mesh-terms-mean",
        "_pairwise/mesh.py",
        "return lax.psum(parts, axis_name)",
        "return lax.pmean(parts, axis_name)",
        "gathered terms are divided by the devices",
        "tests/test_verification.py::test_devices_go_over_different_pairs",
    ),
    Mutant(
        "mesh-padding",
        "_pairwise/over_mesh.py",
        "arrays[name] = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))",
        'arrays[name] = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), "edge")',
        "rows that fill up a mesh count",
        "tests/test_retrieval.py::test_queries_that_fill_up_a_mesh_do_not_count",
    ),
    Mutant(
        "mesh-anchors",
        "blockwise.py",
        "triplets = triplets._replace(anchor=triplets.anchor + first)",
        "triplets = triplets._replace(anchor=triplets.anchor)",
        "mined anchors are counted along the rows of their device",
        "tests/test_blockwise.py::test_triplets_split_over_devices",
    ),
    # The engine of blockwise losses.
    Mutant(
        "tiles-diagonal",
        "_engine/by_tiles.py",
        "by_square = by_square + by_square.T",
        "by_square = by_square + 0",
        "gradients within a tile lack one direction",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tiles-fallback",
        "_engine/by_tiles.py",
        "negative = jnp.where(beyond, negative, farthest_negatives(tiles, alone))",
        "negative = jnp.where(beyond, negative, 0 * farthest_negatives(tiles, alone))",
        "semi-hard falls back to the first reference",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tiles-hardest",
        "_engine/by_tiles.py",
        "hardest = jnp.argmax(jnp.where(valid, squares, -1), axis=0)[None]",
        "hardest = jnp.argmin(jnp.where(valid, squares, jnp.inf), axis=0)[None]",
        "the nearest positive is mined as the hardest",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tiles-positive-slope",
        "_engine/by_tiles.py",
        (
            "rows = slope[:, None] * (rows_at(batch.anchors, start, blocks.size) - "
            "y[index])"
        ),
        (
            "rows = slope[:, None] * (rows_at(batch.anchors, start, blocks.size) + "
            "y[index])"
        ),
        "the sign in the gradient by a positive",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tiles-tie",
        "_engine/search.py",
        "better = (new[0] < old[0]) | ((new[0] == old[0]) & (new[1] < old[1]))",
        "better = new[0] <= old[0]",
        "of equally near negatives the last visited is mined",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "tiles-beyond",
        "_engine/reductions.py",
        "value = jnp.min(jnp.where(x > limit, x, jnp.inf), axis=axis)",
        "value = jnp.min(jnp.where(x >= limit, x, jnp.inf), axis=axis)",
        "a semi-hard negative is as near as the positive, by tiles",
        "tests/test_engine.py::test_the_least_beyond_a_limit",
    ),
    Mutant(
        "reductions-plain",
        "_engine/reductions.py",
        "return jnp.min(x, axis), jnp.argmin(x, axis).astype(jnp.int32)",
        "return jnp.min(x, axis), jnp.argmax(x, axis).astype(jnp.int32)",
        "on accelerators the farthest negative is mined",
        "tests/test_engine.py::test_the_least_of_all",
    ),
    Mutant(
        "panels-padding",
        "_engine/panels.py",
        "real &= rows(batch.pairs.where)",
        "real &= True",
        "padding counts as an anchor, by panels",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "panels-overlap",
        "_engine/panels.py",
        "a, real = rows(batch.anchors), blocks.fresh(block)",
        "a, real = rows(batch.anchors), jnp.ones(blocks.size, bool)",
        "anchors of overlapping panels count twice",
        "tests/test_engine.py::test_anchors_of_overlapping_panels_count_once",
    ),
    Mutant(
        "panels-near",
        "_engine/panels.py",
        "CANCELLATION_SHARE * scale",
        "0 * scale",
        "near duplicates lose their digits, by panels",
        "tests/test_blockwise.py::test_near_duplicates_keep_their_digits",
    ),
    Mutant(
        "panels-reference-slope",
        "_engine/panels.py",
        "return grads.add_to_references(start, vjp_half_squares(some.T, b, a))",
        "return grads",
        "references have no gradient, by panels",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "panels-total",
        "_engine/by_panels.py",
        "total = total + jnp.sum(counts * gaps, axis=-1)",
        "total = total - jnp.sum(counts * gaps, axis=-1)",
        "the sign of the negatives' part of a sum",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "panels-fallback",
        "_engine/by_panels.py",
        "negative = jnp.where(beyond, negative, farthest[:, None])",
        "negative = jnp.where(beyond, negative, 0 * farthest[:, None])",
        "semi-hard falls back to the first reference, by panels",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "panels-nearest",
        "_engine/by_panels.py",
        "return _if_above(least + limits, d_ap), run * RUN + within",
        "return _if_above(least + limits, d_ap), run * RUN",
        "the negative of a run is its first column",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "anchor-weights",
        "_engine/derivatives.py",
        "_, gradients = _with_gradients(spec, *inputs, cotangents.total)",
        "_, gradients = _with_gradients(spec, *inputs, None)",
        "terms per anchor are differentiated without their weights",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "second-derivatives",
        "_engine/derivatives.py",
        "margin=floats.margin,",
        "margin=2 * floats.margin,",
        "second derivatives are at another margin",
        "tests/test_blockwise.py::test_a_second_derivative_is_that_of_the_matrix",
    ),
    Mutant(
        "products-slope",
        "_engine/slopes.py",
        "return weights[:, None] * a - products",
        "return weights[:, None] * a + products",
        "the sign of a gradient by products",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "scatter-duplicates",
        "_engine/spec.py",
        "return self._replace(anchors=self.anchors.at[index].add(rows))",
        "return self._replace(anchors=self.anchors.at[index].set(rows))",
        "a reference of several anchors keeps one gradient",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "compacted-slot",
        "_engine/terms.py",
        "slot = count + jnp.cumsum(valid.ravel()) - 1",
        "slot = count + jnp.cumsum(valid.ravel())",
        "compacted triplets are off by one",
        "tests/test_blockwise.py",
    ),
    Mutant(
        "block-size-zero",
        "blockwise.py",
        "if block_size < 1:",
        "if block_size < 0:",
        "block_size=0 is accepted",
        "tests/test_blockwise.py",
    ),
    # Losses of pairs.
    Mutant(
        "softmax-logit-sign",
        "softmax_losses.py",
        "return -d / parameters.temperature",
        "return d / parameters.temperature",
        "softmax losses attract negatives",
        "tests/test_pair_losses.py::test_other_parameters[supcon]",
    ),
    Mutant(
        "supcon-denominator",
        "softmax_losses.py",
        "costs = jax.nn.softplus(pairs.negatives - positives) + (positives - mean)",
        "costs = jax.nn.softplus(pairs.negatives - mean)",
        "supcon_loss has no positives in its denominator",
        "tests/test_pair_losses.py::test_other_parameters[supcon]",
    ),
    Mutant(
        "supcon-anchors",
        "softmax_losses.py",
        "valid, count = pairs.has_positive,",
        "valid, count = pairs.has_positive | pairs.has_negative,",
        "supcon_loss counts anchors without a positive",
        "tests/test_pair_losses.py::test_other_parameters[supcon]",
    ),
    Mutant(
        "nt-xent-mean",
        "softmax_losses.py",
        "return pairs.terms(total, jnp.sum(pairs.exists, axis=-1))",
        "return pairs.terms(total, pairs.has_positive)",
        "nt_xent_loss divides by the anchors",
        "tests/test_pair_losses.py::test_other_parameters[nt_xent]",
    ),
    Mutant(
        "nt-xent-denominator",
        "softmax_losses.py",
        "costs = jax.nn.softplus(pairs.negatives[..., None] - z)",
        "costs = jnp.maximum(pairs.negatives[..., None], -1e9) - z",
        "nt_xent_loss has no positive in its denominator",
        "tests/test_pair_losses.py::test_other_parameters[nt_xent]",
    ),
    Mutant(
        "decoupled-without-negatives",
        "softmax_losses.py",
        "exists = pairs.exists & (pairs.negatives != -jnp.inf)[..., None]",
        "exists = pairs.exists",
        "anchors without a negative count in decoupled_contrastive_loss",
        "tests/test_pair_losses.py::test_one_class_alone",
    ),
    Mutant(
        "nca-numerator",
        "softmax_losses.py",
        "costs = jax.nn.softplus(pairs.negatives - _positives_lse(pairs, z))",
        "costs = jax.nn.softplus(pairs.negatives - _sum_over(pairs.exists, z))",
        "nca_loss multiplies the probabilities of the positives",
        "tests/test_pair_losses.py::test_other_parameters[nca]",
    ),
    Mutant(
        "info-nce-second-side",
        "softmax_losses.py",
        "(parameters.shape_of(_nt_xent_cost), parameters, reason, symmetric)",
        "(parameters.shape_of(_nt_xent_cost), parameters, reason)",
        "symmetric=True has no effect",
        "tests/test_pair_losses.py::test_hard_negatives_are_references_without_an_anchor",
    ),
    Mutant(
        "softmax-guard-side",
        "softmax_losses.py",
        "return low, jnp.full_like(low, jnp.inf)",
        "return jnp.full_like(low, -jnp.inf), low",
        "false negatives are the only negatives",
        "tests/test_pair_losses.py::test_collapse_is_not_a_false_negative",
    ),
    Mutant(
        "multi-similarity-base",
        "softmax_losses.py",
        "logits = alpha * (pairs.distances - (1 - base))",
        "logits = alpha * (pairs.distances - base)",
        "multi_similarity_loss has a base for distances of positives",
        "tests/test_pair_losses.py::test_other_parameters[multi_similarity]",
    ),
    Mutant(
        "multi-similarity-positives",
        "softmax_losses.py",
        "exists &= ~(pairs.distances <= (pairs.nearest - mining[0])[..., None])",
        "exists &= ~(pairs.distances <= (pairs.nearest + mining[0])[..., None])",
        "mining drops hard positives",
        "tests/test_pair_losses.py::test_other_parameters",
    ),
    Mutant(
        "multi-similarity-negatives",
        "softmax_losses.py",
        "return jnp.full_like(farthest, -jnp.inf), farthest + parameters[3]",
        "return jnp.full_like(farthest, -jnp.inf), farthest - parameters[3]",
        "mining drops negatives near the farthest positive",
        "tests/test_pair_losses.py::test_other_parameters",
    ),
    Mutant(
        "circle-weight-gradient",
        "softmax_losses.py",
        "weight = lax.stop_gradient(jax.nn.relu(1 - d + margin))",
        "weight = jax.nn.relu(1 - d + margin)",
        "the weights of circle_loss have a gradient",
        "tests/test_pair_losses.py::test_other_parameters[circle]",
    ),
    Mutant(
        "circle-positive-weight",
        "softmax_losses.py",
        "weight = lax.stop_gradient(jax.nn.relu(margin + pairs.distances))",
        "weight = lax.stop_gradient(jax.nn.relu(1 - margin + pairs.distances))",
        "circle_loss weighs positives by another optimum",
        "tests/test_pair_losses.py::test_other_parameters[circle]",
    ),
    Mutant(
        "circle-one-side",
        "softmax_losses.py",
        "valid = pairs.has_positive & (pairs.negatives != -jnp.inf)",
        "valid = pairs.has_positive",
        "anchors without a negative count in circle_loss",
        "tests/test_pair_losses.py::test_one_class_alone",
    ),
    Mutant(
        "lifted-margin-sign",
        "softmax_losses.py",
        "return margin - d",
        "return -margin - d",
        "generalized_lifted_structure_loss subtracts its margin",
        "tests/test_pair_losses.py::test_other_parameters[generalized_lifted_structure]",
    ),
    Mutant(
        "class-sub-centre",
        "softmax_losses.py",
        "nearest = jnp.argmin(jnp.where(pairs.exists, pairs.distances, jnp.inf),",
        "nearest = jnp.argmax(jnp.where(pairs.exists, pairs.distances, 0),",
        "the farthest sub-centre is the positive",
        "tests/test_pair_losses.py::test_sub_centres_are_references_of_one_label",
    ),
    Mutant(
        "cosface-margin-sign",
        "softmax_losses.py",
        "return _class_cost(pairs, scale * (1 - _class_distance(pairs) - margin))",
        "return _class_cost(pairs, scale * (1 - _class_distance(pairs) + margin))",
        "cosface_loss adds its margin to the similarity",
        "tests/test_pair_losses.py::test_other_parameters[cosface]",
    ),
    Mutant(
        "arcface-small-angles",
        "softmax_losses.py",
        "s, square = 1 - d, d * (2 - d)",
        "s, square = 1 - d, 1 - (1 - d) ** 2",
        "arcface_loss loses the gradient of small angles",
        "tests/test_pair_losses.py::test_near_duplicates[arcface]",
    ),
    Mutant(
        "arcface-root",
        "softmax_losses.py",
        "sine = jnp.where(inside, jnp.sqrt(jnp.where(inside, square, 1)), 0)",
        "sine = jnp.sqrt(square)",
        "arcface_loss has an infinite gradient at angle 0",
        "tests/test_pair_losses.py::test_arcface_has_a_finite_gradient_everywhere",
    ),
    Mutant(
        "arcface-continuation",
        "softmax_losses.py",
        "continued = s - margin * jnp.sin(margin)",
        "continued = 0 * s - 1",
        "arcface_loss has no gradient beyond pi less the margin",
        "tests/test_pair_losses.py::test_arcface_has_a_finite_gradient_everywhere",
    ),
    Mutant(
        "proxy-anchor-sides",
        "softmax_losses.py",
        "return PairLoss(shape, parameters, _CLASS_VECTORS, swapped=True)",
        "return PairLoss(shape, parameters, _CLASS_VECTORS)",
        "embeddings are the anchors of proxy_anchor_loss",
        "tests/test_pair_losses.py::test_other_parameters[proxy_anchor]",
    ),
    Mutant(
        "proxy-anchor-classes",
        "softmax_losses.py",
        "pairs.terms(negatives, proxies),",
        "pairs.terms(negatives, pairs.has_positive),",
        "proxy_anchor_loss divides negatives by the classes of the batch",
        "tests/test_pair_losses.py::test_other_parameters[proxy_anchor]",
    ),
    Mutant(
        "contrastive-positive-margin",
        "separable_losses.py",
        "return jax.nn.relu(d - parameters[0])",
        "return jax.nn.relu(d + parameters[0])",
        "contrastive_loss adds the margin of positives",
        "tests/test_pair_losses.py::test_other_parameters[contrastive]",
    ),
    Mutant(
        "contrastive-negatives",
        "separable_losses.py",
        "return jax.nn.relu(parameters[1] - d)",
        "return jax.nn.relu(d - parameters[1])",
        "contrastive_loss attracts negatives",
        "tests/test_pair_losses.py::test_other_parameters[contrastive]",
    ),
    Mutant(
        "margin-loss-margin",
        "separable_losses.py",
        "return jax.nn.relu(margin + beta - d)",
        "return jax.nn.relu(beta - margin - d)",
        "margin_loss has no margin for negatives",
        "tests/test_pair_losses.py::test_other_parameters[margin]",
    ),
    Mutant(
        "margin-loss-boundaries",
        "separable_losses.py",
        'boundary = PerAnchor(beta, "beta") if jnp.ndim(beta) else beta',
        "boundary = jnp.mean(jnp.asarray(beta))",
        "boundaries of anchors are averaged",
        "tests/test_pair_losses.py::test_boundaries_of_classes[uneven]",
    ),
    Mutant(
        "sigmoid-slope",
        "separable_losses.py",
        "slope = jnp.where(x >= 0, 1, power) / (1 + power)",
        "slope = jnp.where(x > 0, 1, 0) - jnp.sign(x) * power / (1 + power)",
        "sigmoid_loss has no gradient at equal logits",
        (
            "tests/test_pair_losses.py::"
            "test_equal_logits_have_half_a_slope_in_the_sigmoid_loss"
        ),
    ),
    Mutant(
        "sigmoid-bias-sign",
        "separable_losses.py",
        "return _softplus(-(scale * (1 - d) + bias))",
        "return _softplus(-(scale * (1 - d) - bias))",
        "sigmoid_loss subtracts the bias of positives",
        "tests/test_pair_losses.py::test_other_parameters[sigmoid]",
    ),
    Mutant(
        "pairs-mean-of-anchors",
        "pair_losses.py",
        "return _checked(sums).total / jnp.maximum(sums.anchors, 1)",
        "return _checked(sums).total / jnp.maximum(sums.valid, 1)",
        "mean_of_anchors divides by the pairs",
        "tests/test_pair_losses.py::test_sigmoid_loss_is_divided_by_the_anchors",
    ),
    Mutant(
        "pairs-mean-by-side",
        "pair_losses.py",
        "return mean_active.of_sums(positives) + mean_active.of_sums(negatives)",
        "return 2 * mean_active.of_sums(sums)",
        "mean_active_by_side pools positives and negatives",
        "tests/test_pair_losses.py::test_other_parameters[contrastive]",
    ),
    Mutant(
        "pairs-maximum",
        "pair_losses.py",
        "lax.stop_gradient(jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1))",
        "lax.stop_gradient(jnp.max(logits, axis=-1))",
        "pairs that do not count set the maximum of a log-sum-exp",
        "tests/test_pair_losses.py::test_an_anchor_is_no_negative_of_itself",
    ),
    Mutant(
        "pairs-limit-tie",
        "pair_losses.py",
        "kept = kept & ~((distances < low) | (distances >= high))",
        "kept = kept & ~((distances <= low) | (distances >= high))",
        "negatives at the limit are false negatives",
        "tests/test_pair_losses.py::test_collapse_is_not_a_false_negative",
    ),
    Mutant(
        "pairs-nearest",
        "pair_losses.py",
        "correct = self.has_positive & (nearest < self.nearest)",
        "correct = self.has_positive",
        "active counts anchors whose nearest is a negative",
        "tests/test_pair_losses.py::test_share_of_anchors_whose_nearest_is_a_positive",
    ),
    Mutant(
        "pairs-masked-cost",
        "pair_losses.py",
        "costs = jnp.where(mask, costs, 0)",
        "costs = costs + 0",
        "pairs that do not count have a cost",
        "tests/test_pair_losses.py::test_other_parameters[sigmoid]",
    ),
    Mutant(
        "pairs-scalar-check",
        "pair_losses.py",
        "if value is not None and jnp.ndim(value):",
        "if False:",
        "two traced temperatures are accepted",
        "tests/test_pair_losses.py::test_traced_parameters_are_scalars",
    ),
    Mutant(
        "pairs-needs-references",
        "pair_losses.py",
        "missing = by_labels and pairs.reference_labels is None",
        "missing = False",
        "class vectors are the anchors themselves",
        "tests/test_pair_losses.py::test_class_vectors_need_labels",
    ),
    Mutant(
        "smooth-ap-own-rank",
        "smooth_ap.py",
        "others = self.positive & (self.columns != column[..., None])",
        "others = self.positive",
        "a positive is ahead of itself by one half",
        "tests/test_pair_losses.py::test_other_parameters[smooth_ap]",
    ),
    Mutant(
        "smooth-ap-anchor-count",
        "smooth_ap.py",
        "weight = 1 / (jnp.maximum(self.count, 1) + include_anchor).astype(d.dtype)",
        "weight = 1 / (jnp.maximum(self.count, 1) + 0).astype(d.dtype)",
        "smooth_ap_loss divides by positives without the anchor",
        "tests/test_pair_losses.py::test_other_parameters[smooth_ap]",
    ),
    Mutant(
        "smooth-ap-slope",
        "smooth_ap.py",
        "by_ahead, by_inside = scale * inside, -scale * ahead",
        "by_ahead, by_inside = scale * inside, scale * ahead",
        "smooth_ap_loss pushes positives apart",
        "tests/test_pair_losses.py::test_other_parameters[smooth_ap]",
    ),
    Mutant(
        "smooth-ap-temperature",
        "smooth_ap.py",
        "by_temperature -= jnp.sum(slopes * gaps, axis=-1)",
        "by_temperature += jnp.sum(slopes * gaps, axis=-1)",
        "the gradient by the temperature has the wrong sign",
        "tests/test_pair_losses.py::test_other_parameters[smooth_ap]",
    ),
    Mutant(
        "smooth-ap-tiles-own-rank",
        "smooth_ap.py",
        "others = exists & (jnp.arange(len(distances)) != index)[:, None]",
        "others = exists",
        "without a matrix a positive is ahead of itself",
        "tests/test_pair_losses.py::test_values_of_embeddings_with_padding[smooth_ap]",
    ),
    Mutant(
        "smooth-ap-tiles-no-positive",
        "smooth_ap.py",
        "return jnp.where(count > 0, total / jnp.maximum(count + own, 1), 0)",
        "return total / jnp.maximum(count + own, 1)",
        "without a matrix anchors without a positive have a cost",
        "tests/test_pair_losses.py::test_values_of_embeddings_with_padding[smooth_ap]",
    ),
    Mutant(
        "blockwise-second-side",
        "_blockwise_pairs.py",
        "symmetric = loss.symmetric and not apart",
        "symmetric = False",
        "symmetric=True has no effect without a matrix",
        "tests/test_pair_losses.py::test_values_of_embeddings_with_padding",
    ),
    Mutant(
        "blockwise-swapped-padding",
        "_blockwise_pairs.py",
        '"where": options["reference_where"],',
        '"where": None,',
        "class vectors that are padding are anchors",
        "tests/test_pair_losses.py::test_values_of_embeddings_with_padding[proxy_anchor]",
    ),
    Mutant(
        "blockwise-both-sides",
        "_blockwise_pairs.py",
        "sides = [] if loss.swapped else [(embeddings, labels, options)]",
        "sides = [(embeddings, labels, options)]",
        "proxy_anchor_loss adds the side of the embeddings",
        "tests/test_pair_losses.py::test_values_of_embeddings_with_padding[proxy_anchor]",
    ),
    Mutant(
        "blockwise-pairs-block-size",
        "_blockwise_pairs.py",
        "if block_size < 1:",
        "if block_size < 0:",
        "block_size=0 is accepted",
        "tests/test_pair_losses.py::test_block_sizes_are_at_least_1",
    ),
    Mutant(
        "matryoshka-norm",
        "matryoshka.py",
        "return normalize_vectors(x[..., :dim]) if normalize else x[..., :dim]",
        "return x[..., :dim]",
        "prefixes have no unit norm",
        "tests/test_matryoshka.py::test_the_sum_of_the_losses_of_unit_prefixes",
    ),
    Mutant(
        "matryoshka-weights",
        "matryoshka.py",
        "return functools.reduce(jnp.add, map(jnp.multiply, factors, values))",
        "return functools.reduce(jnp.add, values)",
        "weights of prefixes have no effect",
        "tests/test_matryoshka.py::test_the_sum_of_the_losses_of_unit_prefixes",
    ),
    Mutant(
        "matryoshka-references",
        "matryoshka.py",
        'pairs["references"] = prefix("references", references, dim)',
        'pairs["references"] = jnp.roll(prefix("references", references, dim), 1)',
        "references are not those of their labels",
        "tests/test_matryoshka.py::test_references_have_the_same_prefixes",
    ),
    Mutant(
        "caching-last-chunk",
        "gradient_caching.py",
        "lambda x: x.reshape(n - rest, *x.shape[2:])",
        "lambda x: lax.stop_gradient(x).reshape(n - rest, *x.shape[2:])",
        "the last chunk alone has a gradient",
        "tests/test_gradient_caching.py::test_value_and_gradients_are_those_of_the_batch",
    ),
    Mutant(
        "caching-key",
        "gradient_caching.py",
        "keys = () if key is None else (jax.random.fold_in(key, index),)",
        "keys = () if key is None else (key,)",
        "all chunks have the same random key",
        "tests/test_gradient_caching.py::test_dropout_is_the_same_in_both_passes",
    ),
    Mutant(
        "caching-last-key",
        "gradient_caching.py",
        "last = jax.checkpoint(encode)(params, last, jnp.uint32(count))",
        "last = jax.checkpoint(encode)(params, last, jnp.uint32(0))",
        "the last chunk has the key of the first",
        "tests/test_gradient_caching.py::test_dropout_is_the_same_in_both_passes",
    ),
    Mutant(
        "caching-activations",
        "gradient_caching.py",
        "again = jax.checkpoint(encode, prevent_cse=False)",
        "again = encode",
        "the activations of all chunks are kept",
        "tests/test_gradient_caching.py::test_activations_are_those_of_one_chunk",
    ),
    Mutant(
        "class-index-largest-label",
        "_pairwise/class_index.py",
        "last = jnp.array(jnp.iinfo(ordered.dtype).max, ordered.dtype)",
        "last = jnp.iinfo(ordered.dtype).max",
        "labels uint32 with padding raise",
        "tests/test_blockwise.py::test_labels_without_a_sign_with_padding",
    ),
    # The engine of losses of pairs.
    Mutant(
        "log-sum-exp-own-shift",
        "_engine/log_sum_exp.py",
        "own = jnp.where(inside, logits, -jnp.inf)",
        "own = logits",
        "ignored pairs set the shift of an anchor",
        "tests/test_pair_losses.py::test_exponents_that_vanish_beside_those_of_other_anchors",
    ),
    Mutant(
        "log-sum-exp-lost",
        "_engine/log_sum_exp.py",
        "lost = [jnp.any((s < least) & (x < jnp.inf)) for s, x in zip(sums, nearest)]",
        "lost = [jnp.any(s < 0) for s, x in zip(sums, nearest)]",
        "sums of distant negatives underflow to minus infinity",
        "tests/test_pair_losses.py::test_exponents_that_vanish_beside_those_of_other_anchors",
    ),
    Mutant(
        "log-sum-exp-limits",
        "_engine/log_sum_exp.py",
        "return ~((d < low) | (d >= high))",
        "return ~(d < low)",
        "negatives beyond the upper limit count",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "log-sum-exp-weights",
        "_engine/log_sum_exp.py",
        "jnp.where(inside, side.at(by_total) * jnp.exp(x), 0)",
        "jnp.where(inside, jnp.exp(x), 0)",
        "gradients ignore the weights of anchors",
        "tests/test_pair_losses.py::test_gradients_by_embeddings_are_the_oracles",
    ),
    Mutant(
        "log-sum-exp-parameters",
        "_engine/log_sum_exp.py",
        "return grads, jax.tree.map(jnp.add, by_parameters, new)",
        "return grads, new",
        "the gradient by the temperature has the last tile alone",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "separable-active",
        "_engine/separable.py",
        "jnp.sum((costs > 0).astype(costs.dtype), side.axis),",
        "jnp.sum((costs >= 0).astype(costs.dtype), side.axis),",
        "negatives without a cost count as active",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "separable-weights",
        "_engine/separable.py",
        "each = [1.0 if weights is None else side.at(weights) for side in group]",
        "each = [1.0 for side in group]",
        "gradients of terms ignore the weights of anchors",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "separable-per-anchor",
        "_engine/separable.py",
        "groups = [[side] for side in sides] if of_anchors else [sides]",
        "groups = [sides]",
        "columns of a tile have the boundaries of its rows",
        "tests/test_pair_losses.py::test_boundaries_of_classes",
    ),
    Mutant(
        "pairs-total-weight",
        "_engine/pair_losses.py",
        "gradients = jax.tree.map(lambda x: x * weight, of_total)",
        "gradients = of_total",
        "gradients of a mean are those of the sum",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "pairs-symmetric-columns",
        "_engine/pair_losses.py",
        "start = tile.column + len(self.batch.anchors)",
        "start = tile.column",
        "the other direction adds to the anchors",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "smooth-ap-columns",
        "_engine/smooth_ap.py",
        "for start, part in zip(starts, parts):",
        "for start, part in zip(starts[:1], parts):",
        "columns of a mirrored tile have no ranks",
        "tests/test_pair_losses.py",
    ),
    Mutant(
        "vectors-in-place-overlap",
        "_pairwise/batch.py",
        "new = jnp.where(blocks.fresh(block)[:, None], new, old)",
        "new = new + 0 * old",
        "rows that two blocks share have a gradient pulled back twice",
        "tests/test_pair_losses.py::test_gradients_of_many_vectors",
    ),
    # Memory and relevance.
    Mutant(
        "memory-position",
        "memory.py",
        "(memory.position + count) % size,",
        "(memory.position + n) % size,",
        "padding leaves gaps in the ring",
        "tests/test_memory.py::test_keeps_the_last",
    ),
    Mutant(
        "memory-push-gradient",
        "memory.py",
        "lax.stop_gradient(new)",
        "new",
        "kept embeddings have a gradient",
        "tests/test_memory.py::test_what_is_kept_has_no_gradient_either_way",
    ),
    Mutant(
        "memory-references-gradient",
        "memory.py",
        "kept = lax.stop_gradient(memory.embeddings).astype(x.dtype)",
        "kept = memory.embeddings.astype(x.dtype)",
        "references of earlier batches have a gradient",
        "tests/test_memory.py::test_what_is_kept_has_no_gradient_either_way",
    ),
    Mutant(
        "memory-empty-slots",
        "memory.py",
        '"reference_where": jnp.concatenate([real, memory.valid]),',
        '"reference_where": jnp.concatenate([real, memory.valid | True]),',
        "empty slots are references",
        "tests/test_memory.py::test_an_empty_memory_changes_nothing",
    ),
    Mutant(
        "memory-device-rows",
        "memory.py",
        "positions += lax.axis_index(axis_name) * (n + size)",
        "positions += lax.axis_index(axis_name) * n",
        "on a mesh anchors with a memory are their own positives",
        (
            "tests/test_memory.py::"
            "test_positions_count_along_the_references_of_all_devices"
        ),
    ),
    Mutant(
        "relevance-cap",
        "relevance.py",
        "weights = jnp.where(within, jnp.minimum(row, cap), 0)",
        "weights = jnp.where(within, row, 0)",
        "copies are drawn as often as their relevance",
        "tests/test_relevance.py::test_triplets_are_drawn_as_often_as_they_should",
    ),
    Mutant(
        "relevance-equal",
        "relevance.py",
        "inside = jnp.where((apart >= gap) & (apart > 0), weights, 0)",
        "inside = jnp.where(apart >= gap, weights, 0)",
        "equally relevant items make a triplet",
        "tests/test_relevance.py::test_padding_is_not_drawn_and_nothing_is_not_valid",
    ),
    # Retrieval.
    Mutant(
        "relevance-score-tie",
        "retrieval/relevance.py",
        "total = jnp.sum(jnp.where(near < far, 1.0, -1.0), where=counted)",
        "total = jnp.sum(jnp.where(near <= far, 1.0, -1.0), where=counted)",
        "a tie is in the right order",
        "tests/test_relevance.py::test_order_and_score_are_their_definitions",
    ),
    Mutant(
        "relevance-top-k",
        "retrieval/relevance.py",
        "return (jnp.sum(before & ranked) < k) & ranked[item]",
        "return (jnp.sum(before & ranked) <= k) & ranked[item]",
        "k + 1 images are found early",
        "tests/test_relevance.py::test_order_and_score_are_their_definitions",
    ),
    Mutant(
        "rank-tie",
        "retrieval/rankings.py",
        "lower = jnp.arange(RUN) < (index % RUN)[..., None]",
        "lower = jnp.arange(RUN) > (index % RUN)[..., None]",
        "of equally far references the last comes first",
        "tests/test_retrieval.py::test_metrics_are_their_definitions",
    ),
    Mutant(
        "rank-counted-r",
        "retrieval/rankings.py",
        "within = own <= relevant[:, None]",
        "within = own < relevant[:, None]",
        "R-precision looks at R - 1 references",
        "tests/test_retrieval.py::test_metrics_are_their_definitions",
    ),
    Mutant(
        "rank-sorted-r",
        "retrieval/rankings.py",
        "within = relevant & (rank <= count)",
        "within = relevant & (rank < count)",
        "R-precision looks at R - 1 references, by sorting",
        "tests/test_retrieval.py::test_queries_that_rank_different_references",
    ),
    Mutant(
        "rank-map-at-r",
        "retrieval/rankings.py",
        "new = within, precision * within, precision",
        "new = within, precision, precision",
        "MAP@R counts ranks beyond R",
        "tests/test_retrieval.py::test_metrics_are_their_definitions",
    ),
    Mutant(
        "recall-tie",
        "retrieval/rankings.py",
        "lower = jnp.arange(columns) < index - tile.index[0]",
        "lower = jnp.arange(columns) > index - tile.index[0]",
        "recall alone breaks ties the other way",
        "tests/test_retrieval.py::test_recall_alone",
    ),
    Mutant(
        "neighbors-missing",
        "retrieval/rankings.py",
        "return jnp.where(exists, distances, jnp.inf), jnp.where(exists, index, -1)",
        "return jnp.where(exists, distances, jnp.inf), index",
        "a neighbour that does not exist has an index",
        "tests/test_retrieval.py::test_neighbors_are_those_of_loops",
    ),
    Mutant(
        "neighbors-k",
        "retrieval/neighbors.py",
        "choices = m if positions is None else m - 1",
        "choices = m",
        "k may count the query itself",
        "tests/test_retrieval.py::test_bad_k",
    ),
    Mutant(
        "retrieval-nan",
        "retrieval/evaluation.py",
        "x = jnp.where(self.finite, x.astype(jnp.float32), jnp.nan)",
        "x = x.astype(jnp.float32)",
        "embeddings of NaN look like skill",
        "tests/test_retrieval.py::test_nan_does_not_look_like_skill",
    ),
    Mutant(
        "retrieval-queries",
        "retrieval/evaluation.py",
        "    queries = jnp.sum(counts)\n",
        "    queries = jnp.asarray(counts.size)\n",
        "queries with nothing relevant count as failures",
        "tests/test_retrieval.py::test_metrics_are_their_definitions",
    ),
    Mutant(
        "few-shot-mean",
        "retrieval/few_shot.py",
        "count = add_up(where.astype(x.dtype))",
        "count = add_up(jnp.ones_like(where, x.dtype))",
        "padding counts in a class mean",
        "tests/test_retrieval.py::test_few_shot_with_padding",
    ),
    Mutant(
        "few-shot-padding",
        "retrieval/few_shot.py",
        "share = jnp.sum(correct & real, axis=-1) / jnp.maximum(count, 1)",
        "share = jnp.sum(correct, axis=-1) / jnp.maximum(count, 1)",
        "padding counts as right answers",
        "tests/test_retrieval.py::test_few_shot_with_padding",
    ),
    Mutant(
        "identification-tie",
        "retrieval/identification.py",
        "nearer = real & (distance < rejected[:, None])",
        "nearer = real & (distance <= rejected[:, None])",
        "one too many unknown queries get a name",
        "tests/test_identification.py::test_identification_is_its_definition",
    ),
    Mutant(
        "identification-class",
        "retrieval/rankings.py",
        "others = labels != labels[index][:, None]",
        "others = jnp.arange(len(labels)) != index[:, None]",
        "a class is found twice",
        "tests/test_identification.py::test_identification_is_its_definition",
    ),
    # Verification.
    Mutant(
        "far-tie",
        "verification/evaluation.py",
        "within = jnp.sum(false(curve.up_to) <= far)",
        "within = jnp.sum(false(curve.below) <= far)",
        "negatives at the threshold are not counted",
        "tests/test_verification.py::test_rates_are_their_definitions",
    ),
    Mutant(
        "far-strict",
        "verification/evaluation.py",
        "within = jnp.sum(false(curve.up_to) <= far)",
        "within = jnp.sum(false(curve.up_to) < far)",
        "a FAR that is met exactly is refused",
        "tests/test_verification.py::test_rates_are_their_definitions",
    ),
    Mutant(
        "far-not-shown",
        "verification/evaluation.py",
        "measurable = negatives * far >= 1 - 1e-6",
        "measurable = negatives * far >= 0",
        "a FAR that too few negatives can show has a rate",
        "tests/test_verification.py::test_a_far_that_few_negatives_cannot_show_is_nan",
    ),
    Mutant(
        "area-tie",
        "verification/evaluation.py",
        "ahead = 1 - (false(curve.below) + false(curve.up_to)) / 2",
        "ahead = 1 - false(curve.up_to)",
        "ties do not count in the area",
        "tests/test_verification.py::test_rates_are_their_definitions",
    ),
    Mutant(
        "accuracy-threshold",
        "verification/curve.py",
        "most = jnp.argmax(right)",
        "most = len(right) - 1 - jnp.argmax(right[::-1])",
        "the largest of equally good thresholds",
        (
            "tests/test_verification.py::test_rates_are_their_definitions "
            "tests/test_verification.py::test_folds"
        ),
    ),
    Mutant(
        "threshold-middle",
        "_thresholds.py",
        "middle = last + (following - last) / 2",
        "middle = following",
        "a threshold is a distance, and not between two",
        "tests/test_verification.py::test_thresholds_do_what_they_say",
    ),
    Mutant(
        "k-fold-leak",
        "verification/folds.py",
        (
            "curve = Curve.of_pairs(distances, positive & ~held_out, negative & "
            "~held_out)"
        ),
        "curve = Curve.of_pairs(distances, positive, negative)",
        "a fold chooses its own threshold",
        "tests/test_verification.py::test_folds",
    ),
    Mutant(
        "k-fold-error",
        "verification/folds.py",
        "error = jnp.std(accuracies, ddof=1) / math.sqrt(folds)",
        "error = jnp.std(accuracies) / math.sqrt(folds)",
        "the standard error is too small",
        "tests/test_verification.py::test_folds",
    ),
    Mutant(
        "bootstrap-copies",
        "verification/resampling.py",
        "copies[different_identities[:, 0]] * copies[different_identities[:, 1]],",
        "copies[different_identities[:, 0]],",
        "pairs of identities that are not drawn count",
        "tests/test_verification.py::test_a_replicate_is_the_pairs_of_its_draw",
    ),
    Mutant(
        "verification-own-pair",
        "verification/evaluation.py",
        "at += before[anchor] + 1",
        "at += before[anchor]",
        "an item is paired with itself",
        "tests/test_verification.py::test_all_pairs",
    ),
    Mutant(
        "verification-64-bits",
        "verification/curve.py",
        "and distances.dtype.itemsize == 8",
        "and distances.dtype.itemsize == 16",
        "distances of 64 bits are compared in 32",
        (
            "tests/test_verification.py::"
            "test_a_threshold_of_64_bits_separates_what_32_bits_do_not"
        ),
    ),
    # Collapse.
    Mutant(
        "collapse-centre",
        "collapse.py",
        "centred = jnp.where(real[:, None], x - jnp.sum(x, axis=0) / count, 0)",
        "centred = jnp.where(real[:, None], x - jnp.mean(x, axis=0), 0)",
        "padding moves the centre",
        "tests/test_collapse.py::test_padding_and_metric",
    ),
    Mutant(
        "collapse-norm",
        "collapse.py",
        "        jnp.mean(norms, where=real),",
        "        jnp.mean(norms),",
        "padding counts in the mean norm",
        "tests/test_collapse.py::test_too_few",
    ),
    Mutant(
        "collapse-tiles",
        "collapse.py",
        "deviations + jnp.sum(squares) + apart**2 * count * new / both,",
        "deviations + jnp.sum(squares),",
        "the spread between tiles is left out",
        "tests/test_collapse.py::test_report_of_several_tiles",
    ),
    # Learning: batches.
    Mutant(
        "sampling-repeats",
        "learn/data/sampling.py",
        "replace=len(self.members[c]) < self.per_class,",
        "replace=len(self.members[c]) <= self.per_class,",
        "a class of exactly K images repeats some",
        "tests/test_data.py::test_batches_are_p_classes_of_k",
    ),
    Mutant(
        "sampling-step",
        "learn/data/sampling.py",
        "draw = np.random.default_rng((self.seed, 1, step))",
        "draw = np.random.default_rng((self.seed, 1, 0))",
        "every step draws with the same numbers",
        "tests/test_data.py::test_every_class_and_every_image_is_seen",
    ),
    Mutant(
        "sampling-frequency",
        "learn/data/sampling.py",
        "return draw.choice(len(counts), self.classes, replace=False, p=share)",
        "return draw.choice(len(counts), self.classes, replace=False)",
        "frequency draws classes uniformly",
        "tests/test_data.py::test_classes_drawn_by_frequency",
    ),
    Mutant(
        "sampling-half-turns",
        "learn/data/sampling.py",
        "quarters = 2 * turn if self.rotation_classes == 2 else turn % 4",
        "quarters = turn % 4",
        "half turns are quarter turns",
        "tests/test_data.py::test_half_turns_of_oblong_images",
    ),
    Mutant(
        "sampling-shard",
        "learn/data/sampling.py",
        "return np.split(batch, count)[index]",
        "return np.split(batch, count)[0]",
        "all processes have the first part of a batch",
        "tests/test_data.py::test_processes_share_a_batch",
    ),
    Mutant(
        "sampling-roles",
        "learn/data/sampling.py",
        "indices = self.triplets[_sharded(chosen, self.shard)].T.ravel()",
        "indices = self.triplets[_sharded(chosen, self.shard)].ravel()",
        "roles of given triplets are mixed",
        "tests/test_data.py::test_batches_of_triplets",
    ),
    Mutant(
        "hierarchy-level",
        "learn/data/hierarchy.py",
        "if 0 < groups.max(initial=0) < finer.max(initial=0):",
        "if 0 < groups.max(initial=0) <= finer.max(initial=0):",
        "a level that groups nothing is kept",
        "tests/test_hierarchy.py::test_levels_are_the_folders_that_are_shared",
    ),
    Mutant(
        "hierarchy-turns",
        "learn/data/hierarchy.py",
        (
            "levels + turn * (levels.max(axis=1, keepdims=True) + 1) for turn in "
            "range(turns)"
        ),
        "levels + turn * levels.max(axis=1, keepdims=True) for turn in range(turns)",
        "groups of turned classes overlap",
        "tests/test_hierarchy.py::test_levels_are_the_folders_that_are_shared",
    ),
    Mutant(
        "hierarchy-weights",
        "learn/training/objectives.py",
        "weights = [2.0**-level for level in range(len(levels) + 1)]",
        "weights = [2.0**level for level in range(len(levels) + 1)]",
        "coarse levels weigh more",
        "tests/test_hierarchy.py::test_coarse_levels_weigh_half_of_the_level_below",
    ),
    Mutant(
        "given-parts",
        "learn/training/objectives.py",
        "triplets = jnp.moveaxis(of_parts, 1, 0).reshape(3, -1, x.shape[-1])",
        "triplets = of_parts.reshape(3, -1, x.shape[-1])",
        "triplets of several processes are mixed",
        (
            "tests/test_hierarchy.py::"
            "test_triplets_of_several_processes_are_each_their_own"
        ),
    ),
    # Learning: checkpoints.
    Mutant(
        "checkpoint-newest",
        "learn/training/checkpoints.py",
        "for step in reversed(self.steps):",
        "for step in self.steps:",
        "the oldest state is restored",
        (
            "tests/test_learn.py::"
            "test_damaged_checkpoints_fall_back "
            "tests/test_learn.py::"
            "test_any_path_will_do"
        ),
    ),
    Mutant(
        "checkpoint-content",
        "learn/training/checkpoints.py",
        'if metadata["digest"] != _digest(loaded):',
        "if False:",
        "a damaged state is restored",
        "tests/test_learn.py::test_damaged_checkpoints_fall_back",
    ),
    Mutant(
        "checkpoint-dtype",
        "learn/training/checkpoints.py",
        (
            'types = [f"{np.shape(x)}{jax.dtypes.canonicalize_dtype(x.dtype)}" for x '
            "in arrays]"
        ),
        'types = [f"{np.shape(x)}" for x in arrays]',
        "a state of another dtype is restored",
        "tests/test_learn.py::test_states_of_another_model_are_left_alone",
    ),
    Mutant(
        "checkpoint-unreadable",
        "learn/training/checkpoints.py",
        "return bool(written) and _file_digests(self.directory / str(step)) != written",
        "return bool(written)",
        "a state that cannot be read is moved aside as damaged",
        "tests/test_learn.py::test_what_cannot_be_read_is_not_damaged",
    ),
    Mutant(
        "checkpoint-read-back",
        "learn/training/checkpoints.py",
        "            self._load(step, arrays)\n",
        "            pass\n",
        "a written state is not read back",
        "tests/test_learn.py::test_a_state_is_read_back_before_the_last_good_one_goes",
    ),
    # Learning: the loop.
    Mutant(
        "step-ema-decay",
        "learn/training/steps.py",
        "averaged: Any = optax.incremental_update(params, averaged, 1 - ema_decay)",
        "averaged: Any = optax.incremental_update(params, averaged, ema_decay)",
        "the average keeps what it should forget",
        "tests/test_training.py::test_averages_keep_what_their_decay_says",
    ),
    Mutant(
        "step-memory-momentum",
        "learn/training/steps.py",
        "slow: Any = optax.incremental_update(params.model, slow, 1 - memory_momentum)",
        "slow: Any = optax.incremental_update(params.model, slow, memory_momentum)",
        "the slow network follows at once",
        "tests/test_training.py::test_averages_keep_what_their_decay_says",
    ),
    Mutant(
        "step-warmup",
        "learn/training/steps.py",
        "where = jnp.broadcast_to(remember, labels.shape)",
        "where = jnp.broadcast_to(True, labels.shape)",
        "the memory keeps batches of its warm-up",
        "tests/test_learn.py::test_a_batch_is_compared_with_those_before",
    ),
    Mutant(
        "step-chunk-statistics",
        "learn/training/steps.py",
        "x, rest = _train_embed_jitted(params.model, rests[-1], chunk, graph=graph)",
        "x, rest = _train_embed_jitted(params.model, rests[0], chunk, graph=graph)",
        "statistics follow the last chunk alone",
        "tests/test_training.py::test_statistics_are_of_all_chunks",
    ),
    Mutant(
        "training-average",
        "learn/training/loop.py",
        "params = state.params if state.average is None else state.average",
        "params = state.params",
        "the model is left without its average",
        "tests/test_learn.py::test_the_average_of_parameters",
    ),
    Mutant(
        "training-resume-step",
        "learn/training/loop.py",
        "self.start, self.state, damaged = restored",
        "_, self.state, damaged = restored",
        "a resumed run begins at step 0",
        "tests/test_learn.py::test_training_goes_on_where_it_stopped",
    ),
    Mutant(
        "training-resume-batch",
        "learn/training/loop.py",
        "_prefetched(self.source, steps),",
        "_prefetched(self.source, range(len(steps))),",
        "a resumed run repeats the first batches",
        "tests/test_learn.py::test_training_goes_on_where_it_stopped",
    ),
    Mutant(
        "training-key",
        "learn/training/loop.py",
        "key = jax.random.fold_in(self.key, step)",
        "key = jax.random.fold_in(self.key, 0)",
        "every step augments alike",
        "tests/test_training.py::test_every_step_augments_with_its_own_key",
    ),
    Mutant(
        "training-warmup",
        "learn/training/loop.py",
        "remember = step >= self.memory_warmup_steps",
        "remember = step > self.memory_warmup_steps",
        "the memory warms up one step too long",
        "tests/test_learn.py::test_a_batch_is_compared_with_those_before",
    ),
    Mutant(
        "training-best",
        "learn/training/selection.py",
        "highest = candidate if earlier.mean() > last.mean() else now",
        "highest = candidate if earlier.mean() < last.mean() else now",
        "the worst validation is the candidate",
        "tests/test_learn.py::test_an_earlier_model_is_kept_if_it_exceeds_noise",
    ),
    Mutant(
        "training-noise",
        "learn/training/selection.py",
        "kept = candidate if exceeds_noise(earlier, last) else now",
        "kept = candidate if earlier.mean() > last.mean() else now",
        "a noisy early checkpoint is kept",
        "tests/test_learn.py::test_an_earlier_model_is_kept_if_it_exceeds_noise",
    ),
    # Images and splits.
    Mutant(
        "image-turned",
        "learn/data/image_files.py",
        "    6: Image.Transpose.ROTATE_270,",
        "    6: Image.Transpose.ROTATE_90,",
        "photographs are turned the wrong way",
        "tests/test_data.py::test_photographs_are_upright_however_the_camera_was_held",
    ),
    Mutant(
        "image-mirrored",
        "learn/data/image_files.py",
        "    2: Image.Transpose.FLIP_LEFT_RIGHT,",
        "    2: Image.Transpose.FLIP_TOP_BOTTOM,",
        "mirrored photographs are flipped the other way",
        "tests/test_data.py::test_photographs_are_upright_however_the_camera_was_held",
    ),
    Mutant(
        "image-transparency",
        "learn/data/image_shape.py",
        'behind = Image.new("RGBA", image.size, background)',
        'behind = Image.new("RGBA", image.size, "black")',
        "black always shows through transparency",
        "tests/test_data.py::test_every_kind_of_picture_is_read",
    ),
    Mutant(
        "image-16-bits",
        "learn/data/image_shape.py",
        "top = white_of(peak(image)) if white is None else white",
        "top = 255",
        "grey of 16 bits is cut off at 255",
        "tests/test_data.py::test_grey_of_more_than_8_bits_has_one_white",
    ),
    Mutant(
        "image-white",
        "learn/data/image_shape.py",
        "return next((white for white in WHITES if peak <= white), peak)",
        "return next((white for white in WHITES if peak < white), peak)",
        "white of 8 bits counts as grey of 10",
        "tests/test_data.py::test_grey_of_more_than_8_bits_has_one_white",
    ),
    Mutant(
        "image-border",
        "learn/data/image_shape.py",
        "mean = np.concatenate(border).mean(axis=0).round().astype(np.uint8)",
        "mean = pixels.mean(axis=(0, 1)).round().astype(np.uint8)",
        "bars have the colour of the whole image",
        "tests/test_data.py::test_images_are_made_into_one_shape_without_distortion",
    ),
    Mutant(
        "split-copies",
        "learn/data/splits.py",
        "units = [list(same) for _, same in copies]",
        "units = [[index] for _, same in copies for index in same]",
        "copies of a test image are trained on",
        "tests/test_data.py::test_copies_of_an_image_stay_together",
    ),
    Mutant(
        "split-names",
        "learn/data/splits.py",
        (
            "return [sorted(indices, key=lambda index: digests[index]) for indices in "
            "members]"
        ),
        "return members",
        "names of files decide what is held out",
        "tests/test_data.py::test_what_is_held_out_does_not_depend_on_names",
    ),
    Mutant(
        "split-share",
        "learn/data/splits.py",
        "return [max(least, int(share * n + 0.5)) for share in shares]",
        "return [max(least, int(share * n)) for share in shares]",
        "held out shares are rounded down",
        "tests/test_data.py::test_a_folder_of_images",
    ),
    # Applications.
    Mutant(
        "search-tie",
        "apps/search/index.py",
        "kept.sort(key=lambda hit: (hit.distance, hit.path))",
        "kept.sort(key=lambda hit: hit.distance)",
        "equally near hits come in any order",
        (
            "tests/test_search.py::"
            "test_all_ties_are_looked_at_before_the_first_by_path_is_taken"
        ),
    ),
    Mutant(
        "search-cut",
        "apps/search/index.py",
        "and len(kept) >= k",
        "and False",
        "ties at the k-th hit are cut off in any order",
        (
            "tests/test_search.py::"
            "test_all_ties_are_looked_at_before_the_first_by_path_is_taken"
        ),
    ),
    Mutant(
        "search-removed",
        "apps/search/update.py",
        "removed = [",
        "removed = [] and [",
        "removed images are still found",
        "tests/test_search.py::test_an_index_follows_its_folder",
    ),
    Mutant(
        "search-changed",
        "apps/search/update.py",
        "if path in known and known[path].stamp == stamp:",
        "if path in known:",
        "changed images keep their old vectors",
        "tests/test_search.py::test_an_index_follows_its_folder",
    ),
    Mutant(
        "search-embedder",
        "apps/search/folder_table.py",
        'maker = "another embedder, or another state of the run"',
        "return",
        "vectors of two embedders are compared",
        "tests/test_search.py::test_an_index_of_another_embedder_is_refused",
    ),
    Mutant(
        "search-duplicates",
        "apps/search/duplicates.py",
        "np.linalg.norm(x[o",
        "0.0 * np.linalg.norm(x[o",
        "images a little too far apart are duplicates",
        "tests/test_search.py::test_near_duplicates_are_no_duplicates",
    ),
    Mutant(
        "clustering-known",
        "apps/clustering/linkage.py",
        "mutual &= d <= np.minimum(self.known[a], self.known[b])",
        "mutual &= d <= np.maximum(self.known[a], self.known[b])",
        "groups merge beyond the neighbours that are known",
        "tests/test_clustering.py::test_groups_are_those_of_average_linkage_on_the_matrix",
    ),
    Mutant(
        "clustering-copies",
        "apps/clustering/linkage.py",
        "counts.astype(np.float64)",
        "np.ones(len(x))",
        "copies count once in the mean of a group",
        "tests/test_clustering.py::test_copies_weigh_as_often_as_they_occur",
    ),
    Mutant(
        "clustering-bcubed",
        "apps/clustering/evaluation.py",
        "others = in_group[self.members] - weighted",
        "others = in_group[self.members] - n",
        "copies of a drawn class are errors of each other",
        "tests/test_clustering.py::test_metrics_are_their_definitions",
    ),
    Mutant(
        "clustering-threshold",
        "apps/clustering/calibration.py",
        "best = int(np.argmax(scores))",
        "best = int(np.argmin(scores))",
        "the worst threshold of groups is chosen",
        "tests/test_clustering.py::test_the_threshold_is_the_best_on_the_images_of_a_calibration",
    ),
    Mutant(
        "calibration-needed",
        "apps/verification/calibration.py",
        "if different * far < NEEDED - 1e-6:",
        "if different * far < 1 - 1e-6:",
        "a threshold rests on one false accept",
        "tests/test_verify.py::test_rates_that_are_not_shown_are_refused",
    ),
    Mutant(
        "calibration-balance",
        "apps/verification/calibration.py",
        'regression = LogisticRegression(class_weight="balanced").fit(',
        "regression = LogisticRegression().fit(",
        "the probability is that of rare pairs",
        "tests/test_verify.py::test_the_probability_is_a_logistic_regression",
    ),
    Mutant(
        "calibration-lowest",
        "apps/verification/calibration.py",
        "threshold=max(threshold, -1.0),",
        "threshold=threshold,",
        "a threshold that accepts nothing is no finite number",
        "tests/test_verify.py::test_copies_in_different_classes_leave_no_threshold",
    ),
    Mutant(
        "calibration-key",
        "apps/verification/calibration.py",
        "if calibration.embedder != key:",
        "if False:",
        "a threshold of another embedding is used",
        "tests/test_verify.py::test_a_threshold_decides_about_two_images",
    ),
    Mutant(
        "verify-side",
        "apps/verification/decision.py",
        "distance <= calibration.threshold,",
        "distance >= calibration.threshold,",
        "images that are far apart are taken for the same",
        "tests/test_verify.py::test_a_threshold_decides_about_two_images",
    ),
    Mutant(
        "verify-folds",
        "apps/verification/intervals.py",
        "within = np.flatnonzero((where[images] == k).all(axis=1))",
        "within = np.flatnonzero((where[images] == k).any(axis=1))",
        "folds share classes",
        "tests/test_verify.py::test_folds_share_no_class",
    ),
    Mutant(
        "verify-trained",
        "apps/verification/evaluation.py",
        "of not in trained_on and stem(path) in named",
        "stem(path) in named",
        "a threshold is chosen on classes that were trained on",
        "tests/test_verify.py::test_classes_that_were_trained_on_are_left_out",
    ),
    Mutant(
        "verify-same-folder",
        "apps/verification/evaluation.py",
        "same = data == name or Path(data).resolve() == folder.resolve()",
        "same = data == name",
        "a threshold is chosen on the folder that the run was trained on",
        "tests/test_verify.py::test_classes_of_the_folder_of_a_run_are_left_out",
    ),
    Mutant(
        "identify-itself",
        "apps/identification/gallery.py",
        "kept = np.array([other != path for other in self.paths])",
        "kept = np.array([True for other in self.paths])",
        "an image of the gallery is taken for itself",
        "tests/test_identify.py::test_an_image_of_the_gallery_is_not_taken_for_itself",
    ),
    Mutant(
        "identify-threshold",
        "apps/identification/gallery.py",
        "gallery.names[labels[0]] if distances[0] <= threshold else None,",
        "gallery.names[labels[0]] if distances[0] >= threshold else None,",
        "probes that are far from every class get a name",
        "tests/test_identify.py::test_names_are_of_the_nearest_class",
    ),
    Mutant(
        "identify-ties",
        "apps/identification/evaluation.py",
        "if last == following:",
        "if False:",
        "a threshold at tied distances lets through more than its rate",
        "tests/test_identify.py::test_strangers_tell_the_rate_at_this_gallery",
    ),
]


class Outcome(NamedTuple):
    """The result of one mutant.

    Attributes:
        mutant: the mutant.
        status: killed, timeout, survived or error.
        killer: the test that failed, the command that was stopped, or the error.
        seconds: the time of all test runs.
        by_quick_test: whether the quick lane stops it.
    """

    mutant: Mutant
    status: str
    killer: str
    seconds: float
    by_quick_test: bool


class BrokenRun(Exception):
    """A test run that neither passes nor has failed tests."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := sorted({*(options.only or ())} - known.keys()):
        print(f"--only must name mutants, got {', '.join(unknown)}.", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.only or known]
    if faults := faults_of_list(MUTANTS):
        print("\n".join(faults), file=sys.stderr)
        return 2
    files = files_of_tree()
    try:
        if not options.trust:
            check_unchanged(files, chosen)
        outcomes = run_all(files, chosen, options)
    except BrokenRun as error:
        print(error, file=sys.stderr)
        return 2
    counts = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("killed", "timeout", "survived", "error")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if options.table is not None:
        options.table.write_text(table_of(outcomes))
    if counts["error"]:
        return 2
    stopped = counts["killed"] + counts["timeout"]
    by_quick_tests = sum(outcome.by_quick_test for outcome in outcomes)
    print(f"{by_quick_tests} of {len(outcomes)} by quick tests")
    enough = by_quick_tests >= QUICK_SHARE * len(outcomes)
    if options.lane == "ci":
        enough &= stopped >= CI_SHARE * len(outcomes)
    return 0 if enough else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of mutants side by side (default 2)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="names of the mutants to run"
    )
    parser.add_argument(
        "--lane",
        choices=("quick", "ci"),
        default="quick",
        help="tests that must kill: quick ones, or with ci also slow ones",
    )
    parser.add_argument(
        "--hinted", action="store_true", help="run the hinted tests alone, and no lane"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="skip the run of the hinted tests on unchanged code",
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write a Markdown table of results"
    )
    return parser.parse_args(arguments)


def faults_of_list(mutants: Sequence[Mutant]) -> list[str]:
    """Mutants that do not fit the code, or tests that do not exist."""
    faults = []
    names = [mutant.name for mutant in mutants]
    faults += [
        f"{name}: the name must be unique" for name in {*names} if names.count(name) > 1
    ]
    for mutant in mutants:
        count = (ROOT / mutant.path).read_text().count(mutant.old)
        if count != 1:
            faults.append(
                f"{mutant.name}: old text must occur once in {mutant.path}, it occurs "
                f"{count} times: {mutant.old.strip()}"
            )
        if mutant.old == mutant.new:
            faults.append(f"{mutant.name}: old and new text must differ")
        for test in mutant.tests.split():
            if not (ROOT / test.partition("::")[0]).is_file():
                faults.append(f"{mutant.name}: there is no file of tests {test}")
    return faults


def files_of_tree() -> list[Path]:
    """Files of the tree that Git does not ignore, also outside of a repository."""
    with tempfile.TemporaryDirectory() as directory:
        git = ["git", f"--git-dir={directory}", f"--work-tree={ROOT}"]
        subprocess.run([*git, "init", "--quiet"], check=True, cwd=ROOT)
        listing = subprocess.run(
            [*git, "ls-files", "-z", "--others", "--exclude-standard"],
            check=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    return [Path(name) for name in listing.stdout.split("\0") if name]


@contextlib.contextmanager
def copy_of_tree(files: Sequence[Path]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        for file in files:
            target = Path(directory) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
        yield Path(directory)


def check_unchanged(files: Sequence[Path], mutants: Sequence[Mutant]) -> None:
    """Checks that the hinted tests pass without a mutant.

    Raises:
        BrokenRun: if a test fails, or none runs.
    """
    start = time.monotonic()
    tests = [
        *dict.fromkeys(test for mutant in mutants for test in mutant.tests.split())
    ]
    with copy_of_tree(files) as tree:
        status, output = run_pytest(tree, tests, LANE_MINUTES)
    if status != PASSED:
        raise BrokenRun(f"hinted tests must pass on unchanged code.\n{output}")
    print(f"hinted tests pass on unchanged code, {seconds_since(start)}", flush=True)


def run_all(
    files: Sequence[Path], mutants: Sequence[Mutant], options: argparse.Namespace
) -> list[Outcome]:
    """Runs some mutants side by side; the outcomes in the order of the list."""
    outcomes = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(run_one, files, mutant, options.lane, options.hinted)
            for mutant in mutants
        ]
        try:
            for number, run in enumerate(as_completed(runs), start=1):
                outcome = run.result()
                outcomes[outcome.mutant.name] = outcome
                print(f"{number}/{len(mutants)} {line_of(outcome)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*RUNNING]:
                stop(process)
            raise
    return [outcomes[mutant.name] for mutant in mutants]


def line_of(outcome: Outcome) -> str:
    mutant, status, killer, seconds, _ = outcome
    shown = "SURVIVED" if status == "survived" else f"{status} {killer}"
    return f"{mutant.name} ({mutant.path}): {shown}, {seconds:.0f} s"


def run_one(files: Sequence[Path], mutant: Mutant, lane: str, hinted: bool) -> Outcome:
    """Runs the tests of one mutant until one fails."""
    start = time.monotonic()
    stages: list[tuple[list[str], int]] = [(mutant.tests.split(), HINTED_MINUTES)]
    if not hinted:
        stages.append(([], LANE_MINUTES))
        if lane == "ci":
            stages.append(([*SLOW], LANE_MINUTES))
    status, killer, by_quick_test = "survived", "", False
    with copy_of_tree(files) as tree:
        file = tree / mutant.path
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
        for tests, minutes in stages:
            code, output = run_pytest(tree, tests, minutes)
            if code == PASSED:
                continue
            if code is None:
                status, killer = "timeout", " ".join(["pytest", *tests])
            elif code == FAILED and (failed := first_failed(output)):
                status, killer = "killed", failed
            else:
                status, killer = "error", f"pytest exits with {code}.\n{output}\n"
            by_quick_test = status != "error" and tests != [*SLOW]
            break
    return Outcome(mutant, status, killer, time.monotonic() - start, by_quick_test)


def run_pytest(
    tree: Path, arguments: Sequence[str], minutes: float
) -> tuple[int | None, str]:
    """Exit status of pytest in a copy, None if it was stopped, and its last lines."""
    paths = [str(tree), str(tree / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0"]
    command += ["-p", "no:cacheprovider", "-p", "mutants", *arguments]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A group of its own, with the processes that tests start.
        start_new_session=True,
    )
    RUNNING.add(process)
    try:
        output, _ = process.communicate(timeout=60 * minutes)
        status = process.returncode
    except subprocess.TimeoutExpired:
        stop(process)
        (output, _), status = process.communicate(), None
    finally:
        RUNNING.discard(process)
        stop(process)
    return status, "\n".join(output.splitlines()[-40:])


def pytest_configure() -> None:
    """Stops Hypothesis at the first failed example; pytest calls it in each copy.

    Looking for a simpler example would take up to five minutes.
    """
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    settings.register_profile("mutants", settings.default, phases=phases)
    settings.load_profile("mutants")


def stop(process: subprocess.Popen) -> None:
    """Kills a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def first_failed(output: str) -> str:
    """The node id of the first failed test in pytest's summary."""
    lines = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return lines[0] if lines else ""


def table_of(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table: mutant, file, fault and the test that kills it."""
    rows = ["| Mutant | File | Fault | Killed by |", "| --- | --- | --- | --- |"]
    for mutant, status, killer, *_ in outcomes:
        shown = status
        if status == "killed":
            shown = "`" + killer.removeprefix("tests/").replace("|", r"\|") + "`"
        rows.append(f"| {mutant.name} | `{mutant.file}` | {mutant.fault} | {shown} |")
    return "\n".join(rows) + "\n"


def seconds_since(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
