"""AFSD: pooling, batched soft-NMS, the evaluator and the cutting of clips against literal forms and at their edges."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facebook_nb import afsd
from facebook_nb.afsd import PLANS, ROWS, Config
from facebook_nb.files import UserError, write_image
from facebook_nb.worlds.motion import untrimmed, write_video
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
    slow = torch.zeros_like(score)
    for g in range(6):                                  # pick by pick
        left = score[g].clone().double()
        for _ in range(30):
            if left.max() < 0.2:
                break
            i = int(left.argmax())
            slow[g, i] = left[i]
            iou = torch.from_numpy(afsd.temporal_iou(seg[g, i].numpy(), seg[g].numpy()))
            left, left[i] = left * (-iou.square() / 0.5).exp(), 0
    torch.testing.assert_close(together, slow)
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
    for wrong in ([np.nan, np.nan], [np.nan, 10], [0, np.nan], [10, 0], [0, np.inf]):
        assert afsd.mean_ap(truth, good | {"segment": [wrong, [6, 4]]}).average == 0     # no segments, no hits
    none = {k: np.zeros((0, 2) if k == "segment" else 0) for k in good}
    real = {"video": np.zeros(3, int), "label": np.array([1, 2, 3]), "segment": np.array([[0.0, 10], [20, 60], [5, 9]])}
    numbers, _ = afsd.measure(real, none, 10)
    assert numbers["mAP .3-.7"] == numbers["found"] == numbers["any class 0.5"] == 0
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
    for last in (255, 256):                             # an action that the clip's end cuts hides no background
        assert afsd.insert_background([[3.5, last]], 7, 256, draw) is None
    count = 0
    for _ in range(200):                                # overlapping actions, halves of frames
        seg = np.sort(rng.uniform(0, 129, (3, 2)), 1).clip(max=128)
        done = afsd.insert_background(seg, rng.uniform(2, 9), 128, draw)
        count += done is not None
        assert done is None or sorted(done.frames) == list(range(128))
    assert count > 50
    assert afsd.insert_background([[10, 20]], 7, 256, lambda n: 0) is None          # too short to cut
    assert afsd.insert_background([[0, 255]], 7, 256, lambda n: 0) is None          # no background
    assert afsd.insert_background([], 7, 256, lambda n: 0) is None


def test_clips_without_an_action_inside_are_left_out():
    assert afsd.clip_offsets(100) == [0] and afsd.clip_offsets(256) == [0] and afsd.clip_offsets(300) == [0, 30, 44]
    assert afsd.cut_clips(1000, []) == []
    assert all(len(rows) for _, rows in afsd.cut_clips(900, [[300, 340, 1]]))
    clips = afsd.cut_clips(400, [[20, 60, 1], [240, 280, 2]], stride=100)
    assert [o for o, _ in clips] == [0, 100, 144] and clips[0][1].tolist() == [[20, 60, 1]]     # 16 of 40 frames: no
    assert afsd.cut_clips(256, [[0.2, 1.4, 3], [0.9, 256, 5]]) == []    # frames of a clip count from 1
    assert afsd.cut_clips(256, [[50, 50, 1], [90, 80, 1]]) == []        # these are no actions
    made = afsd.Clips([(300, np.array([[20.0, 60, 1], [240, 270, 2]]))], None, PLANS["thumos14"], 1)
    assert {w for *_, w in made.clips} == {16}                          # 240 to 256 of the first clip


def test_losses_without_any_action_are_finite_and_teach_background_alone():
    net = afsd.Detector([afsd.block(1, 3, 8, 3, groups=2)], 3, c=8, groups=2, levels=3)
    out = net([torch.randn(2, 3, 8)])
    with torch.no_grad():
        net.loc_head.conv1d.bias += 200                 # a distance that overflows
        far = afsd.detect(net([torch.randn(1, 3, 8)]), offsets=[0], fps=10, frames=32).segment
    assert far.isfinite().all()
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


KERNEL = """
import numpy as np, torch
from facebook_nb.afsd import _table_pool, boundary_max_pool, triton_max_pool
g = torch.Generator().manual_seed(0)
for T, C, dtype in ((1, 2, torch.float32), (13, 6, torch.float64), (40, 130, torch.float32), (33, 4, torch.float16),
                    (33, 4, torch.bfloat16)):
    x = (torch.randn(2, C, T, generator=g) * 1.5).round().to(dtype)
    S = (torch.rand(2, 5, 4, generator=g) * (T + 6) - 3).clamp(0, T - 1).long()     # some windows are empty
    up = torch.randn(2, C, 5, generator=g).to(dtype)
    grads = []
    for pool in (triton_max_pool, _table_pool):
        leaf = x.clone().requires_grad_()
        y = pool(leaf, S)
        assert torch.equal(y, boundary_max_pool(x, S)), (T, dtype)
        y.backward(up)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
x = torch.tensor([[[1.0, torch.nan, 5, 2]] * 2])
y = triton_max_pool(x, torch.tensor([[[0, 3, 1, 3], [0, 3, 0, 3]]]))
assert y[0, 0].tolist() == [5, 5] and y[0, 1, 0].isnan() and y[0, 1, 1] == 5
print("equal")
"""


def test_triton_kernels_equal_the_table_in_value_and_gradient():
    pytest.importorskip("triton", reason="triton is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1"}        # read when triton is imported: a process of its own
    done = subprocess.run([sys.executable, "-c", KERNEL], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_kernels_are_used_where_x_lives_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    x, S = torch.randn(2, 512, 256), torch.rand(2, 300, 4) * 260 - 2
    leaf, there = x.clone().requires_grad_(), x.cuda().requires_grad_()
    y, z = afsd.boundary_max_pool(leaf, S), afsd.boundary_max_pool(there, S.cuda())
    assert torch.equal(y, z.cpu())
    up = torch.randn(y.shape)
    y.backward(up), z.backward(up.cuda())
    torch.testing.assert_close(leaf.grad, there.grad.cpu())


def test_without_triton_the_kernels_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    afsd._pool_kernels.cache_clear()
    try:
        with pytest.raises(UserError, match="not installed"):
            afsd.triton_max_pool(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4).long())
    finally:
        afsd._pool_kernels.cache_clear()


def test_other_poolings():
    x, S = torch.randn(1, 4, 20, dtype=torch.float64), torch.tensor([[[2.0, 5, 9, 12], [-3, 2, 18, 30]]])
    centre = afsd.centre_pool(x, S)
    assert torch.equal(centre[..., 0], x[..., 7]) and torch.equal(centre[..., 1], x[..., 14])


def test_benchmark_holds_its_forms_equal():
    rows = afsd.benchmark(T=32, C=8, N=20, repeats=1)
    assert [r["form"] for r in rows][:2] == ["loop", "table"] and all(r["bytes"] > 0 for r in rows)


SMOKE = Config.preset("smoke")


@pytest.fixture(scope="module")
def world():
    return afsd.sequences("as drawn", 3, "train", 2, 256, 2)


def training(world, row):
    return afsd.clips_of(world, ROWS[row], 2)


def test_clips_of_the_world(world):
    clips = training(world, "AFSD")
    torch.manual_seed(0)
    batch = clips.__getitems__(list(range(len(clips))))
    B = len(clips)
    assert batch["x"].shape == (B, 48, 128) and batch["wanted"].shape == (B, 2, 256)
    assert batch["truth"][..., :2].max() <= 1 and set(batch["truth"][..., 2].unique().tolist()) <= {0, 1, 2, 3, 4, 5}
    assert len(batch["cut"]) == len(batch["pieces"]) > 0
    for new in batch["cut"]:                            # a cut clip holds the columns of one of the clips, moved
        old = min(batch["x"], key=lambda x: (x.sum(1) - new.sum(1)).abs().max())
        assert torch.equal(new.T.unique(dim=0), old.T.unique(dim=0)) and not torch.equal(new, old)
    a, b = batch["pieces"][:, 0], batch["pieces"][:, 1]
    assert (a[:, 1] > a[:, 0]).all() and (b[:, 0] > a[:, 1]).all()
    assert not len(training(world, "window max").__getitems__([0])["cut"])


def test_worlds_and_their_labels():
    draw = lambda world, split: afsd.sequences(world, 4, split, 3, 256, 2)
    plain, moved, test = draw("as drawn", "train"), draw("displaced", "train"), draw("displaced", "test")
    true = untrimmed(3, 6004, "train", 256, inset=0.2, decoys=0.04).plans
    for s, plan in zip(moved.segments, true):
        error = np.abs(s - plan.segments) / np.diff(plan.segments, axis=1)
        assert 0 < error.max() < 0.6 and (np.diff(s, axis=1) >= 3).all()
    assert not torch.equal(plain.x, moved.x)
    exact = untrimmed(3, 6004, "test", 256, inset=0.2, decoys=0.04).plans
    assert np.array_equal(test.truth["segment"] * 10, np.concatenate([p.segments for p in exact]))


def test_a_row_trains_what_it_has(world):
    def reached(row, **kw):
        torch.manual_seed(0)
        net = afsd.small_network(5, 8)
        batch = training(world, row).__getitems__([0, 0])
        terms = afsd.objective(net, batch, 0, ROWS[row], PLANS["small"], 3.0, **kw)
        terms["loss"].backward()
        if not ROWS[row].refine:        # nothing hangs on a head that the row does not have
            with torch.no_grad():
                net.detector.prop_loc_head.conv1d.weight *= 3
            again = afsd.objective(net, batch, 0, ROWS[row], PLANS["small"], 3.0, **kw)
            assert again["quality"] == terms["quality"]
        return {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}, terms
    coarse, terms = reached("coarse", contrast=False)
    assert not any("prop" in n or "center" in n for n in coarse) and terms["quality"] == 0
    quality, _ = reached("+ quality", contrast=False)
    assert any("center_head" in n for n in quality) and not any("prop_loc_head" in n for n in quality)
    _, full = reached("AFSD", contrast=True)
    assert full["triplet"] > 0 and full["start"] > 0


def test_answer_leaves_out_what_a_row_has_not(world):
    out = afsd.small_network(5, 8)(world.x[:1, :, :128])
    coarse = afsd.answer(out, ROWS["coarse"])
    assert torch.equal(coarse.refined, out.loc) and torch.equal(coarse.prop_conf, out.conf)
    assert (coarse.center.sigmoid() == 1).all() and afsd.answer(out, ROWS["AFSD"]) is out


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_perfect_probabilities_are_the_actions(seed):
    plan = untrimmed(1, seed, "train", 512).plans[0]
    p = torch.zeros(8, 512)
    for (a, b), k in zip(plan.segments.astype(int), plan.labels):
        p[0, a] = p[1, b] = 1
        p[3 + k, a:b] = 1
    seg, score = afsd.pair_up(p)
    i, k = (score == 1).nonzero(as_tuple=True)
    assert sorted(zip(seg[i].tolist(), k.tolist())) == sorted(zip(plan.segments.tolist(), plan.labels.tolist()))
    found = afsd.thinned(seg, score)
    table = {"video": np.zeros(len(found.score)), "label": found.label, "segment": found.segment, "score": found.score}
    truth = {"video": np.zeros(len(plan.labels)), "label": plan.labels + 1, "segment": plan.segments}
    assert afsd.mean_ap(truth, table, [0.999]).average == 1


def test_pairs_equal_the_literal_form_and_may_be_none():
    p = torch.rand(5, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = [[t for t in range(60) if (t == 0 or q[t] > q[t - 1]) and (t == 59 or q[t] >= q[t + 1])] for q in p[:2]]
    want = {(a, b): p[0, a] * p[1, b] * p[3:, a:b].mean(1) for a in at[0] for b in at[1] if a < b}
    seg, score = afsd.pair_up(p, most=10_000)
    assert len(seg) == len(want)
    for (a, b), row in zip(seg.int().tolist(), score):
        torch.testing.assert_close(row, want[a, b])
    best = afsd.pair_up(p, most=7)[1]
    assert len(best) == 7 and best.max() == score.max()
    assert afsd.peaks(torch.tensor([1.0, 1, 0, 2, 2, 2, 1, 3])).tolist() == [0, 3, 7]
    seg, score = afsd.pair_up(torch.rand(5, 1))         # one frame holds no pair
    assert len(seg) == 0 and len(afsd.thinned(seg, score).score) == 0


class Marked(torch.nn.Module):
    """A pair network that reads its answers off the clip; x: (B, 4, F)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return 40 * x[:, :2] - 20, 40 * x[:, 2:]


@pytest.mark.parametrize("start", [10, 140, 300, 575])
def test_scan_of_pairs_moves_clips_back_to_seconds(start):
    signal = torch.zeros(4, 600 + 256)
    signal[2] = 1
    signal[0, start] = signal[1, start + 15] = 1
    signal[2:, start:start + 15] = torch.tensor([[0.0], [1]])
    times = np.arange(600) / 10
    found = afsd.scan(Marked(), lambda o: signal[:, o:o + 256], times, PLANS["small"], ROWS["pairs"])
    best = found.score.argmax()
    assert found.score[best] > 0.99 and found.label.tolist() == [1] * len(found.label)
    torch.testing.assert_close(found.segment[best], torch.tensor([times[start], times[start] + 1.5]).float())


def test_losses_of_pairs_weigh_rare_ones():
    wanted = torch.zeros(1, 2, 100)
    wanted[..., :10] = 1
    ends, kind = torch.zeros(1, 2, 100, requires_grad=True), torch.zeros(1, 3, 100)
    bounds, classes = afsd.pair_losses(ends, kind, wanted, torch.zeros(1, 100, dtype=torch.long))
    assert bounds.item() == pytest.approx(np.log(2)) and classes.item() == pytest.approx(np.log(3))
    bounds.backward()
    assert ends.grad[..., :10].sum().item() == pytest.approx(-ends.grad[..., 10:].sum().item())


def test_rows_of_the_small_network_alone(tmp_path):
    with pytest.raises(UserError, match="'pairs' is one of network=small"):
        afsd.build(Config.preset("full"), "pairs", 20)
    film = untrimmed(1, 0, "test", 300).frames[0]
    afsd.run(replace(SMOKE, rows=("pairs",), out_dir=tmp_path))
    assert afsd.apply(film, tmp_path / "weights.safetensors", least=0)[0]["detections"]


def test_what_is_looked_at_inside(world):
    S = torch.tensor([[[8.0, 14, 28, 33]]])                 # of an action from 10 to 30 of 64 frames
    f = torch.zeros(1, 4, 64)
    f[0, :2, 11], f[0, 2:, 32] = 1.0, 1.0
    args = S, torch.tensor([20 / 64]), torch.tensor([[[10.0, 10]]]), torch.ones(1, 1, dtype=torch.bool)
    found = afsd.near_boundary(f, *args)
    assert found["near"] == 1 and found["near by chance"] == pytest.approx((5 / 7 + 5 / 6) / 2)
    f[0, 2:, 28] = 2.0                                      # two frames off still counts
    assert afsd.near_boundary(f, *args)["near"] == 1 and afsd.near_boundary(f, *args, within=1)["near"] == 0.5
    torch.manual_seed(0)
    for row in ("+ quality", "guided max"):
        seen = afsd.inside(afsd.small_network(5, 8, pool=ROWS[row].pool), ROWS[row], world, 2)
        assert ("near" in seen) == ("overlap exchanged" in seen) == (row == "guided max") and "quality" in seen
        if row == "+ quality":
            assert seen["overlap"] == seen["overlap coarse"] or np.isnan(seen["overlap"])
    swap = afsd.Exchanged(lambda x, S: x)
    assert swap(torch.tensor([1, 2]), None).tolist() == [2, 1] and swap(torch.tensor([1, 2]), None).tolist() == [1, 2]


class Told(torch.nn.Module):
    """A network that says of each clip where its marked action is; x: (B, 1, F) of 0 and 1."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        B, frames = len(x), x.shape[2]
        c = torch.tensor([0.5]).reshape(1, 1, 1)
        loc, conf = torch.full((B, 1, 2), 1e-3), torch.zeros(B, 1, 2)
        for b in range(B):
            on = x[b, 0].nonzero()
            if len(on):
                loc[b, 0] = torch.tensor([frames / 2 - on.min(), on.max() + 1 - frames / 2])
                conf[b, 0, 1] = 9.0
            else:
                conf[b, 0, 0] = 9.0
        none = torch.zeros(B, 1, 2)
        return afsd.Output(loc, conf, c, none, conf, torch.full((B, 1, 1), 9.0), *[torch.zeros(0)] * 6)


@pytest.mark.parametrize("start", [10, 140, 300, 580])
def test_scan_moves_windows_back_to_seconds(start):
    signal = torch.zeros(1, 600 + 256)
    signal[:, start:start + 15] = 1
    times = np.arange(600) / 10
    times[300:] += 7                                    # a pause in the recording
    read = lambda o: signal[:, o:o + 256]
    found = afsd.scan(Told(), read, times, PLANS["small"], ROWS["AFSD"], batch=2)
    whole = found.segment[(found.segment - torch.tensor([times[start], times[start] + 1.5])).abs().sum(1) < 0.02]
    assert len(whole) and (found.label == 1).all()
    back = afsd.frames_at(afsd.seconds_at(np.array([0.0, 12.5, 300, 599, 600]), times), times)
    np.testing.assert_allclose(back, [0, 12.5, 300, 599, 600])


def test_scan_says_nothing_behind_the_end():
    signal = torch.zeros(1, 256)
    signal[:, 200:220] = 1                              # in the filling of a video of 100 frames
    found = afsd.scan(Told(), lambda o: signal, np.arange(100) / 10, PLANS["small"], ROWS["AFSD"])
    assert not len(found.score)


def test_ticks_of_even_and_uneven_films():
    class Film:
        def __init__(self, times):
            self.times = times

        def __len__(self):
            return len(self.times)
    index, ticks = afsd.timeline(Film(np.arange(300) / 30))
    assert index[:3].tolist() == [2, 5, 8] and len(index) == 100
    index, ticks = afsd.timeline(Film(np.arange(40) / 10))
    assert index.tolist() == list(range(40))
    uneven = np.sort(np.concatenate([np.arange(50) / 25, 2 + np.arange(10) / 5]))
    index, ticks = afsd.timeline(Film(uneven))
    assert len(ticks) == 38 and (uneven[index] < ticks + 0.1).all() and (np.diff(index) >= 0).all()
    index, _ = afsd.timeline(Film(np.arange(50) / 10), duration=10.0)      # really five a second
    assert len(index) == 100 and index[-1] == 49
    index, _ = afsd.timeline(Film(np.arange(3000) / 30), None)
    assert len(index) == 768
    index, _ = afsd.timeline(Film(np.arange(30) / 30), None)
    assert index.tolist() == list(range(30))


def test_errors_lengths_and_kinds_of_mistakes():
    truth = {"video": np.array([0, 0, 1]), "label": np.array([1, 2, 1]),
             "segment": np.array([[0.0, 10], [20, 60], [5, 105]])}
    found = {"video": np.array([0, 0, 1]), "label": np.array([1, 1, 1]), "score": np.array([0.9, 0.8, 0.7]),
             "segment": np.array([[1.0, 10], [20, 60], [0, 100]])}
    errors = afsd.boundary_errors(truth, found)
    assert errors[0] == 0.5 and np.isnan(errors[1]) and errors[2] == 5
    shares = afsd.error_shares(truth, found) * 3
    assert shares.tolist() == [2, 0, 0, 1, 0]           # the second has the place of a 2 and says 1
    (short, middle, long), limits = afsd.ap_by_length(truth, found)
    assert (short, middle, long) == (1, 0, 1) and 10 < limits[0] < 40 < limits[1] < 100
    numbers, _ = afsd.measure(truth, found, 10.0)
    assert numbers["boundary error"] == pytest.approx(27.5)


def write_thumos(root, form):
    """Two training videos, of which one is an array and one missing, and a test video of frames."""
    rows = {"val": [("video_validation_1", "Diving", 1.0, 4.0), ("video_validation_1", "Ambiguous", 5, 6),
                    ("video_validation_2", "LongJump", 0, 3)], "test": [("video_test_1", "Diving", 2.5, 6.0)]}
    if form == "csv":
        for split, actions in rows.items():
            lines = ["video,type,type_idx,start,end,startFrame,endFrame"]
            lines += [f"{v},{k},7,{a},{b},9999,99999" for v, k, a, b in actions]
            path = root / "thumos_annotations" / f"{split}_Annotation_ours.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines))
            path.with_name(f"{split}_video_info.csv").write_text(
                "video,fps,sample_fps,count,sample_count\nvideo_validation_1,30,10,2400,800\nvideo_test_1,25,10,250,100\n")
    elif form == "text":
        (root / "annotation").mkdir()
        for split, actions in rows.items():
            for kind in {k for _, k, _, _ in actions}:
                (root / "annotation" / f"{kind}_{split}.txt").write_text(
                    "".join(f"{v}  {a} {b}\n" for v, k, a, b in actions if k == kind))
    else:
        base = {}
        for split, actions in rows.items():
            for v, k, a, b in actions:
                entry = base.setdefault(v, {"subset": {"val": "train"}.get(split, split), "annotations": []})
                entry["annotations"].append({"segment": [str(a), str(b)], "label": k})
        (root / "thumos_gt.json").write_text(json.dumps({"database": base}))
    media = {"csv": root / "datasets" / "thumos14"}.get(form, root)
    rng = np.random.default_rng(0)
    for folder in ("validation_npy", "test"):
        (media / folder).mkdir(parents=True)
    np.save(media / "validation_npy/video_validation_1.npy", rng.integers(0, 256, (80, 112, 112, 3), np.uint8))
    for i in range(100):
        write_image(media / "test/video_test_1" / f"{i + 1:05d}.jpg", rng.integers(0, 256, (20, 24, 3), np.uint8))


@pytest.mark.parametrize("form", ["csv", "text", "json"])
def test_thumos14_in_three_forms(tmp_path, form):
    write_thumos(tmp_path, form)
    _, classes, train, test = afsd.find_data(tmp_path)
    assert [v.name for v in train] == ["video_validation_1", "video_validation_2"] or form == "text"
    one = next(v for v in train if v.name == "video_validation_1")
    assert one.segments.tolist() == [[1, 4]] and classes[one.labels[0] - 1] == "Diving"
    assert one.path.suffix == ".npy" and test[0].path.is_dir()
    assert next(v for v in train if v.name == "video_validation_2").path is None
    check = afsd.check_data(tmp_path)
    assert check.usable and "1 missing, the first video_validation_2" in str(check)
    assert "--set network=thumos14" in str(check)
    seen = afsd.footage(test[0], PLANS["thumos14"])
    clip = seen.read(0)
    assert clip.shape == (3, 256, 96, 96) and clip.abs().max() <= 1 and not clip[:, 100:].any()
    seen.frames, asked, real = 40, [], seen.clip.read
    seen.clip.read = lambda i: (asked.extend(i), real(i))[1]
    plain = [seen.read(o) for o in (0, 20)]
    asked.clear()
    assert all(torch.equal(seen.read(o, keep=True), x) for o, x in zip((0, 20), plain))
    assert len(asked) == len(set(asked)) and set(asked) == set(seen.index[:60].tolist())    # each is decoded once


def test_activitynet_json_with_films(tmp_path):
    def video(subset, *actions, duration=3.0):
        return {"subset": subset, "duration": duration, "url": "",
                "annotations": [{"segment": [a, b], "label": k} for a, b, k in actions]}
    base = {"aaa": video("training", (0.5, 2.5, "Surfing")), "bbb": video("validation", (1, 2, "Archery")),
            "ccc": video("testing")}
    path = tmp_path / "activity_net.v1-3.min.json"
    path.write_text(json.dumps({"database": base, "taxonomy": [], "version": "VERSION 1.3"}))
    (tmp_path / "videos").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (75, 32, 48, 3), np.uint8)
    write_video(tmp_path / "videos" / "v_aaa.mp4", frames, fps=25)
    (tmp_path / "videos" / "v_bbb.mp4").write_bytes(b"no film")
    layout, classes, train, test = afsd.find_data(tmp_path)
    assert classes == ("Archery", "Surfing")
    assert [v.name for v in train] == ["aaa"] and [v.name for v in test] == ["bbb"]
    assert train[0].labels.tolist() == [2] and train[0].duration == 3
    check = afsd.check_data(tmp_path)
    assert not check.usable and "v_bbb.mp4: not readable" in str(check) and "network=anet" in str(check)
    seen = afsd.footage(train[0], PLANS["anet"])
    assert len(seen.index) == 75 and seen.read(0).shape == (3, 768, 96, 96)
    path.write_text(json.dumps({"database": {"aaa": base["aaa"]}}))
    with pytest.raises(UserError, match="two of the subsets train, training, val"):
        afsd.find_data(tmp_path)
    both = {name: {**base["aaa"], "subset": subset} for name, subset in (("a", "train"), ("b", "val"))}
    path.write_text(json.dumps({"database": both}))
    assert [v.name for v in afsd.find_data(tmp_path)[3]] == ["b"]


def test_damaged_annotations_are_named(tmp_path):
    with pytest.raises(UserError, match="no THUMOS14 annotations.*nor is there"):
        afsd.find_data(tmp_path)
    write_thumos(tmp_path, "csv")
    table = tmp_path / "thumos_annotations" / "val_Annotation_ours.csv"
    table.write_text("video,type,start,end\nv,Diving,soon,2\n")
    with pytest.raises(UserError, match="'soon'"):
        afsd.find_data(tmp_path)
    table.write_text("video,type,start,end\nv,Knitting,1,2\n")
    with pytest.raises(UserError, match="Knitting"):
        afsd.find_data(tmp_path)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns video, type, start, end"):
        afsd.find_data(tmp_path)


class Trunk(torch.nn.Module):
    """Stands for the I3D, which takes seconds a clip."""

    def __init__(self, colours):
        super().__init__()
        self.a, self.b = torch.nn.Conv3d(colours, 8, 1), torch.nn.Conv3d(colours, 8, 1)

    def forward(self, x):
        pool = torch.nn.functional.avg_pool3d
        return self.a(pool(x, (4, 16, 16))), self.b(pool(x, (8, 32, 32)))


class Tiny(afsd.AFSD):
    """The layout of THUMOS14's network, a thousandth of its size."""

    def __init__(self, network, classes, colours):
        torch.nn.Module.__init__(self)
        first = [afsd.block(3, 8, 16, (1, k, k), groups=4, same=False) for k in (6, 3)]
        self.network, self.trunk = network, Trunk(colours)
        self.detector = afsd.Detector(first, classes, c=16, groups=4)


def tiny_full(root):
    """For tests.together: a clip for each of the processes."""
    write_thumos(root, "json")
    return dict(data_root=root, start=None, steps=1, workers=0, batch_size=2)


def stand_ins():
    afsd.AFSD = Tiny


def test_full_preset_on_a_tiny_thumos14(tmp_path, monkeypatch):
    write_thumos(tmp_path, "json")
    with pytest.raises(UserError, match="data_root.*rgb_imagenet.pt"):
        afsd.run(Config.preset("full"))
    with pytest.raises(UserError, match="rgb_imagenet.pt: the I3D's Kinetics weights"):
        afsd.run(Config.preset("full", data_root=tmp_path))
    monkeypatch.setattr(afsd, "AFSD", Tiny)
    config = Config.preset("full", data_root=tmp_path, start=None, steps=1, workers=0, out_dir=tmp_path / "out")
    report = afsd.run(config)
    assert set(report.metrics) == {"AFSD"} and report.claim.verdict == "undecided"
    assert 0 <= report.metrics["AFSD"]["mAP 0.5"][0] <= 100


def test_run_goes_on_where_it_stopped_and_apply_uses_its_weights(tmp_path):
    config = replace(SMOKE, rows=("coarse", "AFSD"), worlds=("as drawn", "displaced"), out_dir=tmp_path / "run")
    first = afsd.run(config)
    steps = tmp_path / "run" / "steps" / "seed0" / "as-drawn" / "AFSD"
    kept = (steps / "trained.npz").stat().st_mtime_ns
    (steps / "tested.npz").unlink()
    again = afsd.run(config)
    assert first.metrics == again.metrics and (steps / "trained.npz").stat().st_mtime_ns == kept
    assert {"mAP 0.7", "displaced: mAP 0.7", "any class 0.7", "near", "overlap exchanged"} <= set(first.metrics["AFSD"])
    film = untrimmed(1, 0, "test", 300).frames[0]
    film = np.kron(film, np.ones((1, 2, 2), np.uint8))
    write_video(tmp_path / "a.mp4", film, fps=10)
    np.save(tmp_path / "b.npy", film)
    for i, image in enumerate(film[:40]):
        write_image(tmp_path / "c" / f"{i:05d}.png", image[..., None].repeat(3, -1))
    (tmp_path / "d.mp4").write_bytes(b"")
    write_image(tmp_path / "still.png", film[0][..., None].repeat(3, -1))
    films = [tmp_path / n for n in ("a.mp4", "d.mp4", "b.npy", "c", "still.png")]
    rows = afsd.apply([*films, film[..., None].repeat(2, -1)],
                      tmp_path / "run" / "weights.safetensors", tmp_path / "out", least=0.02)
    assert list(rows[0])[0] == "input" and "empty" in rows[1]["error"] and "one picture" in rows[4]["error"]
    assert "2 channels" in rows[5]["error"] and all("this book" in row["weights"] for row in rows)
    for row, seconds in ((rows[0], 30), (rows[2], 30), (rows[3], 40 / 12)):
        assert row["detections"] and (tmp_path / "out" / row["timeline"]).stat().st_size > 1000
        scores = [d["score"] for d in row["detections"]]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 100
        assert all(0 <= d["start"] < d["end"] <= seconds + 0.11 and d["label"] in afsd.ACTIONS
                   for d in row["detections"])
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["input"] for r in kept] == [r["input"] for r in rows]


def test_claims_follow_the_numbers():
    worlds = ("as drawn", "displaced")
    row = lambda *a, **more: {"mAP .3-.7": list(a), "displaced: mAP .3-.7": [v - 9 for v in a], **more}
    metrics = {"+ quality": row(50, 51, 52), "AFSD": row(70, 71, 73), "guided max": row(70, 71, 72.9)}
    claim, findings = afsd.claims(metrics, worlds)
    assert claim.verdict == "shown" and claim.effect == pytest.approx(61 / 3) and "(as drawn): AFSD" in claim.text
    assert [(f.text.split(": ")[1], f.verdict) for f in findings] == [
        ("AFSD − guided max", "refuted"), ("AFSD − + quality", "shown"), ("AFSD − guided max", "refuted")]
    assert afsd.claims({"AFSD": row(1)}, worlds)[0].verdict == "undecided"
    near = {"near": [30, 31], "near by chance": [12, 12], "overlap": [0.8, 0.8], "overlap coarse": [0.7, 0.7],
            "overlap exchanged": [0.72, 0.73]}
    checks = afsd.mechanism({"guided max": near, "+ quality": {"quality": [0.3, 0.4]}}, worlds)
    assert [c.holds for c in checks] == [True, False, True]


def test_settings_name_what_is_wrong():
    with pytest.raises(UserError, match="none of pairs"):
        afsd.run(Config.preset("smoke", rows=("corse",)))
    with pytest.raises(UserError, match="--set network=thumos14"):
        afsd.run(Config.preset("full", network="small", start=None))


def test_the_rival_is_kept_where_validation_likes_it_best(monkeypatch):
    scores, seen = iter([0.2, 0.3, 0.3]), []
    monkeypatch.setattr(afsd, "mean_ap", lambda truth, found, tiou: seen.append(tiou) or SimpleNamespace(
        mAP=np.array([next(scores)])))
    config = replace(SMOKE, pair_steps=(1, 2, 3))
    found = afsd.train_row(config, "as drawn", "pairs", 0)
    assert found["number.steps"] == 2 and len(found["loss"]) == 2
    assert all(t[0] == 0.3 and t[-1] == 0.7 for t in seen)


def test_contrast_in_steps_of_its_own(world):
    config = replace(SMOKE, bcl="alternate", steps=2)
    torch.manual_seed(0)
    net = afsd.small_network(5, 8)
    history = afsd.train(config, net, ROWS["AFSD"], training(world, "AFSD"), 0,
                         config.steps)
    assert "detect/loss" in history.losses and "contrast/loss" in history.losses


def test_losses_of_activitynet_take_one_class_and_level_ranges():
    net = afsd.Detector([afsd.block(1, 3, 8, 3, groups=2)], 2, c=8, groups=2, stride=8, std=0.01,
                        factors=(4, 8, 16, 32, 64, 128))
    whole = afsd.OnFeatures(net, 3)
    batch = {"x": torch.randn(2, 3, 96), "truth": afsd.pad_truth([[[0.1, 0.15, 7]], [[0.2, 0.9, 150]]]),
             "wanted": torch.zeros(2, 2, 768), "cut": torch.randn(1, 3, 96),
             "pieces": torch.tensor([[[100.0, 200], [220, 320], [201, 219]]])}
    terms = afsd.objective(whole, batch, 0, ROWS["AFSD"], PLANS["anet"], 1.0, True)
    assert torch.isfinite(terms["loss"]) and terms["loc"] > 0 and terms["ref_cls"] > 0
