"""AFSD: pooling, batched soft-NMS, the evaluator and the cutting of clips against literal forms and at their edges."""
import json

import numpy as np
import pytest
import torch

from facebook_nb import afsd
from facebook_nb.files import UserError
from tests.conftest import ROOT


def literal_pool(x, S):
    B, C, T = x.shape
    where = torch.zeros(B, C, S.shape[1], dtype=torch.long)
    for b, n, k in np.ndindex(B, S.shape[1], C):
        l, r = (min(max(int(v), 0), T - 1) for v in S[b, n, 2 * (k >= C // 2):][:2].tolist())
        best = l
        for j in range(l + 1, r + 1):
            if x[b, k, j] > x[b, k, best]:
                best = j
        where[b, k, n] = best
    return where


@pytest.mark.parametrize("T", [1, 2, 13, 64])
def test_pool_value_and_gradient_equal_the_literal_form(T):
    g = torch.Generator().manual_seed(T)
    x = torch.randn(2, 4, T, generator=g, dtype=torch.float64).mul(1.5).round().requires_grad_()
    S = torch.rand(2, 25, 4, generator=g) * (T + 6) - 3
    y, where = afsd.boundary_max_pool(x, S), literal_pool(x.detach(), S)
    assert torch.equal(y, x.detach().gather(2, where))
    up = torch.randn(y.shape, generator=g, dtype=torch.float64)
    y.backward(up)
    torch.testing.assert_close(x.grad, torch.zeros_like(x).scatter_add(2, where, up))


def test_pool_of_nan_infinite_windows_and_half_precision():
    x = torch.tensor([[[1.0, torch.nan, 5, 2]] * 2])
    S = torch.tensor([[[0, 3, 1, 3], [torch.nan, torch.inf, -torch.inf, 1e30]]])
    y = afsd.boundary_max_pool(x, S)
    assert y[0, 0].tolist() == [5, 5]                   # a NaN inside a window is not seen
    assert y[0, 1, 0].isnan() and y[0, 1, 1] == 5       # where the window begins it is
    with pytest.raises(UserError, match="3 channels"):
        afsd.boundary_max_pool(torch.zeros(1, 3, 4), S)
    half = torch.randn(1, 4, 3000).half()
    far = torch.tensor([[[2049.0, 2051, 2900, 2999]]])
    assert torch.equal(afsd.boundary_max_pool(half, far).float(), afsd.boundary_max_pool(half.float(), far))


def test_mean_pool():
    x, S = torch.randn(2, 4, 20, dtype=torch.float64), torch.randint(-3, 23, (2, 12, 4)).float()
    y = afsd.boundary_mean_pool(x, S)
    for b, n, k in np.ndindex(2, 12, 4):
        l, r = S[b, n, 2 * (k >= 2):][:2].clamp(0, 19).long().tolist()
        torch.testing.assert_close(y[b, k, n], x[b, k, l:max(l, r) + 1].mean())


def test_rows_of_soft_nms_do_not_see_each_other():
    g = torch.Generator().manual_seed(0)
    start = torch.rand(6, 30, generator=g) * 50
    seg = torch.stack([start, start + 1 + torch.rand(6, 30, generator=g) * 20], -1)
    score = torch.rand(6, 30, generator=g)
    score[2, 5:] = score[3] = -1                        # a short row and an empty one
    together = afsd.soft_nms(seg, score, floor=0.2)
    alone = torch.cat([afsd.soft_nms(s[None], p[None], floor=0.2) for s, p in zip(seg, score)])
    assert torch.equal(together, alone) and not together[3].any()
    assert (together <= score.clamp(min=0)).all()
    lost = afsd.soft_nms(seg, score, floor=0.2, keep_last=False)
    assert ((together > 0).sum(1) - (lost > 0).sum(1)).tolist() == [1, 1, 1, 0, 1, 1]


def literal_ap(truth, found, tiou):
    """The protocol, detection by detection; truth and found of one class."""
    taken, hits = set(), []
    for video, seg, _ in sorted(found, key=lambda d: -d[2]):
        own = sorted(((afsd.temporal_iou(np.array(seg), np.array(s)), i) for i, (v, s) in enumerate(truth)
                      if v == video), reverse=True)
        free = [i for iou, i in own if iou >= tiou and i not in taken]
        hits.append(bool(free))
        taken |= set(free[:1])
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return sum(max(precision[i:]) for i, h in enumerate(hits) if h) / len(truth)


def test_evaluator_equals_the_literal_one():
    rng = np.random.default_rng(0)
    def draw(n):
        s = rng.uniform(0, 40, n)
        return {"video": rng.integers(0, 4, n).astype(str), "label": rng.choice(["dive", "jump"], n),
                "segment": np.stack([s, s + rng.uniform(1, 20, n)], 1)}
    truth, found = draw(30), draw(300) | {"score": rng.permutation(300) / 300}
    result = afsd.mean_ap(truth, found, [0.3, 0.6])
    for j, c in enumerate(result.classes):
        rows = [(v, s) for v, k, s in zip(*truth.values()) if k == c]
        dets = [(v, s, p) for v, k, s, p in zip(*found.values()) if k == c]
        for i, t in enumerate((0.3, 0.6)):
            assert abs(result.ap[i, j] - literal_ap(rows, dets, t)) < 1e-12


def test_evaluator_at_its_edges():
    truth = {"video": ["a", "b"], "label": [1, 2], "segment": [[0, 10], [5, 5]]}
    nothing = {"video": [], "label": [], "segment": [], "score": []}
    assert afsd.mean_ap(truth, nothing).average == 0
    strange = {"video": ["z", "a", "a"], "label": [1, 9, 0], "segment": [[0, 10]] * 3, "score": [1, 1, 1]}
    assert afsd.mean_ap(truth, strange).average == 0        # other videos and labels are nobody's
    good = {"video": ["a", "b"], "label": [1, 2], "segment": [[0, 10], [5, 5]], "score": [0.1, 0.2]}
    assert afsd.mean_ap(truth, good).average == 1           # an empty segment finds its empty truth
    with pytest.raises(UserError, match="score"):
        afsd.mean_ap(truth, good | {"score": [0.5]})
    with pytest.raises(UserError, match="no actions"):
        afsd.mean_ap({"video": [], "label": [], "segment": []}, good)


def test_insertion_keeps_every_frame_and_may_not_fit():
    rng = np.random.default_rng(0)
    draw = lambda n: int(rng.integers(n))
    for _ in range(50):
        s = rng.uniform(20, 80)
        done = afsd.insert_background([[s, s + rng.uniform(30, 60)], [180, 200]], 7, 256, draw)
        assert sorted(done.frames) == list(range(256))
        (a, b), (c, d), (e, f) = done.pieces
        assert a < b < c < d and b < e < f < c and c - b == 7
    assert afsd.insert_background([[10, 20]], 7, 256, lambda n: 0) is None          # too short to cut
    assert afsd.insert_background([[0, 255]], 7, 256, lambda n: 0) is None          # no background
    assert afsd.insert_background([], 7, 256, lambda n: 0) is None


def test_clips_without_an_action_inside_are_left_out():
    assert afsd.clip_offsets(100) == [0] and afsd.clip_offsets(256) == [0] and afsd.clip_offsets(300) == [0, 30, 44]
    assert afsd.cut_clips(1000, []) == []
    assert all(len(rows) for _, rows in afsd.cut_clips(900, [[300, 340, 1]]))


def test_losses_without_any_action_are_finite_and_teach_background_alone():
    net = afsd.Detector([afsd.block(1, 3, 8, 3, groups=2)], 3, c=8, groups=2, levels=3)
    out = net([torch.randn(2, 3, 8)])
    label, target = afsd.assign(out.priors[0, :, 0], afsd.pad_truth([[], []]), 32)
    assert not label.any()
    losses = afsd.detection_losses(out, label, target)
    assert losses.loc == losses.ref_loc == losses.quality == 0 and losses.cls > 0 and losses.ref_cls > 0
    losses.cls.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_trunk_norms_stay_fixed_in_training():
    trunk = afsd.I3D(2).train()
    norms = [m for m in trunk.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert trunk.training and norms and not any(m.training for m in norms)
    assert not any(p.requires_grad for m in norms for p in m.parameters())


def test_load_official_names_what_is_wrong():
    layout = json.loads((ROOT / "tests/parity/data/afsd/anet.layout.json").read_text())
    state = {k: torch.zeros(()).expand(v) for k, v in layout.items()}
    lost = "coarse_pyramid_detection.center_head.conv1d.weight"
    with pytest.raises(UserError, match=f"missing.*{lost}"):
        afsd.load_official({k: v for k, v in state.items() if k != lost})
    with pytest.raises(UserError, match="thumos14 or anet"):
        afsd.load_official(state, "thumos")
