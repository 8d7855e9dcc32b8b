"""Verification accuracy and error-versus-reject curves against the reference cases."""
from pathlib import Path

import numpy as np
import pytest

from facebook_nb.metrics.quality import aoc, reject_curve, reject_curve_of_pairs
from facebook_nb.metrics.verification import fold_accuracy
from tests.parity import recipe

DATA = Path(__file__).parent / "data"


def test_fold_accuracy_on_the_official_grid():
    case = np.load(DATA / "fpr" / "cases.npz")
    e = recipe.normal("fpr.dev.verify.e", (400, 32)).astype(np.float64)
    same = recipe.integers("fpr.dev.verify.same", (200,), 2).astype(bool)
    e[1::2][same] = 0.5 * e[0::2][same] + 0.75**0.5 * e[1::2][same]
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    distance = ((e[0::2] - e[1::2]) ** 2).sum(1)
    grid = np.arange(0, 4, 0.01)                 # squared distances; higher scores are more alike here
    result = fold_accuracy(-distance, same, thresholds=-grid)
    assert np.abs(result.accuracy - case["verify/accuracy"]).max() <= 1e-12
    assert np.abs(-result.threshold - case["verify/best"]).max() <= 1e-12
    assert np.abs(result.tar[::7] - case["verify/tpr"]).max() <= 1e-12
    assert np.abs(result.fmr[::7] - case["verify/fpr"]).max() <= 1e-12


@pytest.fixture(scope="module")
def erc():
    ids = recipe.integers("sdd.dev.erc.id", (240,), 30)
    strength = recipe.uniform("sdd.dev.erc.strength", (240,), 0.2, 2)
    e = recipe.normal("sdd.dev.erc.person", (30, 16))[ids] + strength[:, None] * recipe.normal(
        "sdd.dev.erc.noise", (240, 16))
    e = e.astype(np.float64)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    quality = (-strength + 0.3 * recipe.normal("sdd.dev.erc.q", (240,))).astype(np.float64)
    return ids, e, quality


@pytest.mark.parametrize("policy", ["per_subset", "global"])
def test_image_level_curve_and_area(erc, policy):
    case = np.load(DATA / "sdd_fiqa" / "cases.npz")
    ids, e, quality = erc
    curve = reject_curve(e, ids, quality, fmrs=(1e-2, 1e-3), threshold=policy)
    i, j = np.triu_indices(240, 1)
    listed = reject_curve_of_pairs((e[i] * e[j]).sum(1), ids[i] == ids[j], np.c_[i, j], quality,
                                   fmrs=(1e-2, 1e-3), threshold=policy)
    for k, fmr in enumerate(curve.fmrs):
        name = f"erc/image/{policy}/{fmr:g}"
        for c in (curve, listed):
            assert np.abs(c.fnmr[k] - case[name]).max() <= 1e-12
            assert abs(aoc(c, support=0)[fmr] - float(case[name + "/aoc"])) <= 1e-12


def test_pair_level_curve_with_the_nearest_threshold(erc):
    case = np.load(DATA / "sdd_fiqa" / "cases.npz")
    ids, e, quality = erc
    i, j = np.triu_indices(240, 1)
    same = ids[i] == ids[j]
    take = same.copy()
    take[np.argsort(recipe.uniform("sdd.dev.erc.pick", (28680,)), kind="stable")[:4000]] = True
    i, j, same = i[take], j[take], same[take]
    assert [len(i), same.sum()] == case["erc/pair/count"].tolist()
    scores = -np.arccos(np.clip((e[i] * e[j]).sum(1), -1, 1)) / np.pi
    curve = reject_curve_of_pairs(scores, same, np.c_[i, j], quality, fmrs=(1e-2, 1e-3), unit="pair", rule="nearest")
    for k, fmr in enumerate(curve.fmrs):
        assert np.abs(curve.fnmr[k] - case[f"erc/pair/{fmr:g}"]).max() <= 1e-12
