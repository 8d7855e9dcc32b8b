"""Verification and quality metrics: definitions, ties, refusals, equality with literal versions, memory."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from facebook_nb.files import UserError
from facebook_nb.metrics import quality as Q
from facebook_nb.metrics import verification as V


def sets(n, people, d=16, noise=0.8, seed=0):
    """(n, d) float64 embeddings and (n,) identities."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, people, n)
    return rng.normal(size=(people, d))[ids] + noise * rng.normal(size=(n, d)), ids


def tied(n, people, seed=0):
    """Embeddings with exact cosines 0, .25 … 1: four traits of twelve, many pairs equal in every bit."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, people, n)
    taste = rng.random((people, 12))[ids] + rng.random((n, 12))
    return (taste.argsort(1).argsort(1) < 4) / 2, ids


def literal_pairs(e, ids):
    """i, j, cosine, same of all pairs i < j."""
    u = e / np.linalg.norm(e, axis=1, keepdims=True)
    i, j = np.triu_indices(len(u), 1)
    return i, j, (u @ u.T)[i, j], ids[i] == ids[j]


# ---------------------------------------------------------------- thresholds and rates

def test_allowed_matches_is_the_largest_count_within_the_rate():
    rng = np.random.default_rng(0)
    for far, n in [(0.29, 100), (0.1, 30), (0.07, 100), (1e-3, 1000), (0.57, 100), *zip(
            rng.random(300), rng.integers(1, 10**9, 300).tolist())]:
        k = V.allowed_matches(far, n)
        assert k / n <= far < (k + 1) / n


@pytest.mark.parametrize("far", [0, 1, -0.1, 2, float("nan")])
def test_a_rate_outside_0_and_1_is_named(far):
    with pytest.raises(UserError, match="not between 0 and 1"):
        V.far_threshold(np.arange(100.0), far)


@pytest.mark.parametrize("decimals", [8, 1])
def test_threshold_is_the_smallest_that_keeps_the_rate(decimals):
    impostor = np.random.default_rng(1).normal(size=(50, 60)).round(decimals)
    for far in (0.5, 0.1, 0.0123, 0.004):
        xi = V.far_threshold(impostor, far)
        assert (impostor > xi).mean() <= far
        lower = impostor[impostor < xi].max()
        assert (impostor > lower).mean() > far


def test_threshold_that_too_few_pairs_support_is_refused_with_the_number_needed():
    with pytest.raises(UserError, match="0.001 needs 10,000 impostor pairs, there are 200"):
        V.far_threshold(np.arange(200.0), 1e-3)
    assert V.far_threshold(np.arange(200.0), 1e-3, support=0) == 199
    with pytest.raises(UserError, match="there are 0"):
        V.far_threshold([], 0.1, support=0)
    assert V.too_few(1e-3, 10_000) == "" and V.too_few(1e-3, 9_999) != ""


def test_scores_that_are_not_numbers_are_counted():
    bad = np.r_[np.arange(100.0), np.nan]
    for call in (lambda: V.far_threshold(bad, 0.1), lambda: V.roc([1.0], bad),
                 lambda: V.tar_at_far(bad, bad[:100], 0.1),
                 lambda: V.fold_accuracy(bad, np.ones(101))):
        with pytest.raises(UserError, match="1 of 101 are NaN"):
            call()


def test_roc_rates_belong_to_strictly_above():
    rng = np.random.default_rng(2)
    g, i = rng.normal(1, 1, 200).round(1), rng.normal(0, 1, 300).round(1)
    fmr, tar, xi = V.roc(g, i)
    assert np.allclose(fmr, [(i > t).mean() for t in xi], atol=1e-12)
    assert np.allclose(tar, [(g > t).mean() for t in xi], atol=1e-12)
    wins = (g[:, None] > i).mean() + (g[:, None] == i).mean() / 2
    assert abs(V.auc(g, i) - wins) < 1e-12
    assert V.tar_at_far(g, i, 0.1) == (g > V.far_threshold(i, 0.1)).mean()


def test_eer_by_hand():
    assert V.eer([2, 3, 4], [-1, 0, 1]) == 0
    assert V.eer([0, 1], [2, 3]) == 1
    assert V.eer([1, 3, 4, 5], [0, 0.5, 2, 0.2]) == 0.25       # one of four on each side
    assert abs(V.eer([0.0] * 5, [0.0] * 7) - 0.5) < 1e-12       # all equal: a coin
    with pytest.raises(UserError, match="0 genuine"):
        V.eer([], [1.0])


# ---------------------------------------------------------------- folds

def literal_folds(scores, same, folds=10):
    """Accuracy by trying the midpoint below every training score, strictest first."""
    out = []
    for fold in np.array_split(np.arange(len(scores)), folds):
        rest = np.setdiff1d(np.arange(len(scores)), fold)
        u = sorted(set(scores[rest]), reverse=True)
        tries = [u[0], *[(a + b) / 2 for a, b in zip(u, u[1:])], -np.inf]
        best = max(tries, key=lambda t: (((scores[rest] > t) == same[rest]).sum(), t))
        out.append(((scores[fold] > best) == same[fold]).mean())
    return np.array(out)


def test_fold_accuracy_over_midpoints_equals_the_literal_search():
    rng = np.random.default_rng(3)
    same = rng.random(203) < 0.5
    for decimals in (9, 1):
        scores = (rng.normal(size=203) + same).round(decimals)
        result = V.fold_accuracy(scores, same)
        assert np.array_equal(result.accuracy, literal_folds(scores, same))
        assert result.mean == result.accuracy.mean() and result.tar is None


def test_a_grid_is_tried_in_its_order_and_the_first_best_wins():
    scores, same = np.array([0.0, 1.0] * 20), np.array([False, True] * 20)
    for grid, chosen in (([0.2, 0.4, 2.0], 0.2), ([2.0, 0.4, 0.2], 0.4)):
        result = V.fold_accuracy(scores, same, thresholds=np.array(grid))
        assert (result.threshold == chosen).all() and result.mean == 1
    assert (V.fold_accuracy(scores, same).threshold == 0.5).all()


def test_fold_accuracy_refuses_what_it_cannot_split():
    with pytest.raises(UserError, match="9 scores, 9 labels, 10 folds"):
        V.fold_accuracy(np.zeros(9), np.zeros(9, bool))
    with pytest.raises(UserError, match="one label a score"):
        V.fold_accuracy(np.zeros(20), np.zeros(19, bool))


# ---------------------------------------------------------------- all pairs

def test_genuine_pairs_are_all_pairs_of_a_person():
    e, ids = sets(150, 40, seed=4)
    names = np.array([f"p{k}" for k in ids])
    i, j, s, same = literal_pairs(e, names)
    gi, gj, gs = V.genuine_pairs(e, names)
    assert (gi < gj).all() and gs.dtype == np.float64
    order = np.lexsort((gj, gi))
    assert np.array_equal(gi[order], i[same]) and np.array_equal(gj[order], j[same])
    assert np.allclose(gs[order], s[same], atol=1e-12)
    assert [len(a) for a in V.genuine_pairs(e[:3], [1, 2, 3])] == [0, 0, 0]


@pytest.mark.parametrize("make", [sets, tied])
@pytest.mark.parametrize("tile", [7, 64, 512])
def test_kth_largest_equals_sorting_at_every_stop(make, tile):
    e, ids = make(90, 9, seed=5)
    i, j, s, same = literal_pairs(e, ids)
    number = j * (j - 1) // 2 + i
    stops = [0, 1, 300, 301, 2000, len(s)]
    parts = [np.sort(s[(number < stop) & ~same])[::-1] for stop in stops]
    ranks = [sorted({1, (len(p) + 1) // 2, len(p)} - {0})[: 3 * bool(len(p))] for p in parts]
    found, histogram = V.kth_largest(V.unit_rows(e), V.identity_codes(ids, 90), stops, ranks, tile)
    for values, part, ks in zip(found, parts, ranks):
        assert np.allclose(values, part[np.array(ks, int) - 1], atol=0 if make is tied else 1e-12)
    assert histogram.sum() == (~same).sum()


def test_millions_of_equal_scores_stay_exact():
    x = V.unit_rows(np.ones((3000, 4)))                     # 4.5 million pairs in one bin
    (values,), _ = V.kth_largest(x, V.identity_codes(np.arange(3000), 3000), [4498500], [[1, 10**6, 4498500]])
    assert values == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_pairs_equals_the_literal_report(device, dtype):
    e, ids = sets(400, 50, seed=6)
    i, j, s, same = literal_pairs(e, ids)
    r = V.all_pairs(torch.tensor(e, dtype=dtype, device=device), ids, fars=(0.1, 1e-2, 1e-3, 1e-6))
    assert (r.n_genuine, r.n_impostor) == (same.sum(), (~same).sum()) and len(r.notes) == 1
    for far in (0.1, 1e-2, 1e-3):
        assert abs(r.threshold[far] - V.far_threshold(s[~same], far)) < (1e-12 if dtype == torch.float64 else 1e-6)
        assert abs(r.tar[far] - V.tar_at_far(s[same], s[~same], far)) < 2 / r.n_genuine
    assert np.isnan(r.threshold[1e-6]) and np.isnan(r.tar[1e-6]) and "1e-06 needs 10,000,000" in r.notes[0]
    assert abs(r.auc - V.auc(s[same], s[~same])) < 1e-4 and abs(r.eer - V.eer(s[same], s[~same])) < 1e-3
    centres = (r.edges[1:] + r.edges[:-1]) / 2
    assert abs((centres * r.impostor).sum() / r.n_impostor - s[~same].mean()) < 2e-5


def test_embeddings_and_labels_that_cannot_be_used_are_named():
    e = np.ones((4, 3))
    e[2] = 0
    with pytest.raises(UserError, match="embedding 2 .1 in all.: zero"):
        V.all_pairs(e, [0, 0, 1, 1])
    e[2] = np.nan
    with pytest.raises(UserError, match="embedding 2 "):
        V.all_pairs(e, [0, 0, 1, 1])
    e[2] = 1
    with pytest.raises(UserError, match="3 labels for 4 embeddings"):
        V.all_pairs(e, [0, 0, 1])
    with pytest.raises(UserError, match="0 impostor pairs: needs two people"):
        V.all_pairs(e, [0, 0, 0, 0])
    with pytest.raises(UserError, match="expected .images, d."):
        V.unit_rows(np.ones(3))


def test_memory_does_not_grow_with_the_number_of_pairs():
    code = """
import resource, numpy as np, sklearn.metrics, torch
from facebook_nb.metrics.quality import reject_curve
from facebook_nb.metrics.verification import all_pairs
torch.set_num_threads(1)
rng = np.random.default_rng(0)
def run(n):
    e = rng.normal(size=(n, 16)).astype(np.float32)
    all_pairs(e, np.arange(n) // 10)
    reject_curve(e, np.arange(n) // 10, rng.random(n), rates=np.array([0, 0.5]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = run(1000)
print(run(6000) - small)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 60                         # MB; a matrix of 6,000² float32 would be 144


# ---------------------------------------------------------------- error versus reject

def literal_curve(s, same, i, j, q, f, rates, policy, unit):
    """FNMR and thresholds by the definition, one rate at a time."""
    place = np.empty(len(q), int)
    place[np.argsort(q, kind="stable")] = np.arange(len(q))          # 0 is the worst
    worse, better = np.minimum(place[i], place[j]), np.maximum(place[i], place[j])
    fnmr, xis = [], []
    for r in rates:
        if unit == "image":
            kept = worse >= int(r * len(q) + 1e-9)
        else:
            kept = np.ones(len(s), bool)
            kept[np.lexsort((better, worse))[: int(r * len(s) + 1e-9)]] = False
        judged = s[~same] if policy == "global" else s[kept & ~same]
        xis.append(V.far_threshold(judged, f, support=0) if judged.size else np.nan)
        g = s[kept & same]
        fnmr.append((g <= xis[-1]).mean() if g.size and judged.size else np.nan)
    return np.array(fnmr), np.array(xis)


@pytest.mark.parametrize("unit", ["image", "pair"])
@pytest.mark.parametrize("policy", ["per_subset", "global"])
@pytest.mark.parametrize("make", [sets, tied])
def test_curve_over_all_pairs_equals_the_definition(make, policy, unit):
    e, ids = make(120, 10, seed=7)
    q = np.random.default_rng(8).integers(0, 50, 120)                 # many images of equal quality
    i, j, s, same = literal_pairs(e, ids)
    curve = Q.reject_curve(e, ids, q, fmrs=(0.1, 0.01), threshold=policy, unit=unit, tile=32)
    for k, f in enumerate(curve.fmrs):
        fnmr, xi = literal_curve(s, same, i, j, q, f, curve.rates, policy, unit)
        assert np.array_equal(curve.fnmr[k], fnmr, equal_nan=True)
        assert np.allclose(curve.threshold[k], xi, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("policy", ["per_subset", "global"])
def test_curve_of_listed_pairs_equals_that_over_all_pairs(policy):
    e, ids = tied(100, 8, seed=9)
    q = np.random.default_rng(10).integers(0, 30, 100)
    i, j, s, same = literal_pairs(e, ids)
    listed = Q.reject_curve_of_pairs(s, same, np.c_[j, i], q, threshold=policy)
    walked = Q.reject_curve(e, ids, q, threshold=policy)
    for name in ("fnmr", "threshold", "n_genuine", "n_impostor"):
        assert np.array_equal(getattr(listed, name), getattr(walked, name), equal_nan=True), name


def test_listed_pairs_of_equal_quality_go_in_their_order():
    s, same = np.array([0.1, 0.9, 0.8, 0.0, 0.2]), np.array([True, True, True, False, False])
    pairs = np.array([[0, 1], [0, 1], [2, 3], [2, 3], [2, 3]])
    curve = Q.reject_curve_of_pairs(s, same, pairs, np.array([0, 1, 1, 1]), fmrs=(0.5,),
                                    rates=np.array([0, 0.2, 0.4]), unit="pair")
    assert curve.n_genuine.tolist() == [3, 2, 1] and curve.threshold[0].tolist() == [0, 0, 0]
    assert curve.fnmr[0].tolist() == [0, 0, 0]
    s[0] = -1                                                  # the first pair is the one that failed
    assert Q.reject_curve_of_pairs(s, same, pairs, np.array([0, 1, 1, 1]), fmrs=(0.5,), rates=np.array([0, 0.2]),
                                   unit="pair").fnmr[0].tolist() == [1 / 3, 0]


def test_of_equally_good_images_the_earlier_is_rejected_first():
    e, ids = sets(40, 4, seed=11)
    constant = Q.reject_curve(e, ids, np.zeros(40), fmrs=(0.1,))
    falling = Q.reject_curve(e, ids, np.arange(40), fmrs=(0.1,))
    assert np.array_equal(constant.fnmr, falling.fnmr, equal_nan=True)


def test_nothing_left_is_nan_not_zero():
    curve = Q.reject_curve(np.eye(4), [0, 0, 1, 1], np.arange(4), fmrs=(0.5,), rates=np.array([0, 0.5, 0.75]))
    assert curve.n_genuine.tolist() == [2, 1, 0] and curve.n_impostor.tolist() == [4, 0, 0]
    assert curve.fnmr[0, 0] == 1 and np.isnan(curve.fnmr[0, 1:]).all()


def made(fnmr, n_genuine, n_impostor, policy="per_subset"):
    rates = np.linspace(0, 0.9, len(fnmr))
    return Q.RejectCurve((0.1,), rates, np.array([fnmr]), np.zeros((1, len(fnmr))), np.array(n_genuine),
                         np.array(n_impostor), policy)


def test_area_of_curves_known_by_hand():
    plenty = ([1000] * 3, [1000] * 3)
    for fnmr, area in (([0.2, 0.2, 0.2], 0), ([0.2, 0.1, 0.0], 0.5), ([0.2, 0.4, 0.6], -1), ([0.2, 0.0, 0.0], 0.75)):
        assert abs(Q.aoc(made(fnmr, *plenty))[0.1] - area) < 1e-12
    assert abs(Q.aoc(made([0.2, 0.1, 0.9], *plenty), upto=0.5)[0.1] - 0.25) < 1e-12


def test_area_without_support_is_refused_with_a_reason():
    falling = [0.2, 0.1, 0.0]
    for curve, reason in (
        (made(falling, [1000] * 3, [1000, 500, 99]), "needs 100 impostor pairs, there are 99 at a rejection of 0.9"),
        (made(falling, [40] * 3, [1000] * 3), "8 genuine pairs fail before any rejection"),
        (made(falling, [1000, 100, 9], [1000] * 3), "9 genuine pairs are left at 0.95"),
        (made([0.0] * 3, [1000] * 3, [1000] * 3), "0 genuine pairs fail"),
    ):
        assert reason in Q.aoc_refusals(curve)[0.1] and np.isnan(Q.aoc(curve)[0.1])
    few = made(falling, [1000] * 3, [1000, 500, 99])
    assert abs(Q.aoc(few, support=0)[0.1] - 0.5) < 1e-12 and not np.isnan(Q.aoc(few, upto=0.5)[0.1])
    assert np.isnan(Q.aoc(made([0.0] * 3, [1000] * 3, [1000] * 3), support=0)[0.1])         # 0 / 0 has no value
    assert not np.isnan(Q.aoc(made(falling, [1000] * 3, [1000, 500, 99], "global"))[0.1])   # decided at rate 0
    with pytest.raises(UserError, match="needs rates from 0"):
        Q.aoc(few, upto=0.1)


def test_arguments_that_cannot_be_used_are_named():
    e, ids = sets(30, 3)
    q = np.arange(30.0)
    for change, words in (
        ({"quality": q[:29]}, "quality: 29 scores for 30 images"),
        ({"quality": np.where(q == 4, np.nan, q)}, "quality: 1 not finite, first at image 4"),
        ({"rates": np.array([0, 1.0])}, "rates: must rise"),
        ({"rates": np.array([0.5, 0.2])}, "rates: must rise"),
        ({"threshold": "fixed"}, "per_subset or global"),
        ({"unit": "person"}, "image or pair"),
        ({"fmrs": (1.5,)}, "not between 0 and 1"),
    ):
        with pytest.raises(UserError, match=words):
            Q.reject_curve(e, ids, **{"quality": q, **change})
    with pytest.raises(UserError, match="an image number is not in 0 … 29"):
        Q.reject_curve_of_pairs([0.5], [True], [[0, 30]], q)
    with pytest.raises(UserError, match="1 scores, 1 labels, 2 pairs"):
        Q.reject_curve_of_pairs([0.5], [True], [[0, 1], [0, 2]], q)


def test_a_better_score_has_the_larger_area():
    rng = np.random.default_rng(12)
    strength = rng.uniform(0.2, 1.6, 600)
    e = rng.normal(size=(60, 16))[np.arange(600) % 60] + strength[:, None] * rng.normal(size=(600, 16))
    area = [Q.aoc(Q.reject_curve(e, np.arange(600) % 60, q), upto=0.6)[0.01]
            for q in (-strength, -strength + rng.normal(0, 0.5, 600), rng.random(600), strength)]
    assert area[0] > area[1] > area[2] > area[3] and area[0] > 0.4 and area[3] < 0
