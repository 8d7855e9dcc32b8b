"""AFSD's pooling, networks, losses, clips, insertion, detections and evaluator against the reference cases."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb import afsd
from facebook_nb.afsd import (
    AFSD,
    Output,
    activation_losses,
    anet_ranges,
    assign,
    boundary_max_pool,
    boundary_targets,
    clip_offsets,
    contrast_features,
    contrast_loss,
    detect,
    detection_losses,
    insert_background,
    load_official,
    mean_ap,
    name_detections,
    pad_truth,
    priors,
    proposal_windows,
    refined_label,
    soft_nms,
    total_loss,
)
from tests.parity import recipe

DATA = Path(__file__).parent / "data" / "afsd"
CASES = np.load(DATA / "cases.npz")
HEAD = "coarse_pyramid_detection."
T14_LEVELS, AN_LEVELS = [64, 32, 16, 8, 4, 2], [96, 48, 24, 12, 6, 3]


def N(name, *shape, scale=1.0):
    return torch.from_numpy(recipe.normal("afsd." + name, shape, scale))


def check(key: str, value, tol: float, step: int = 1) -> None:
    """`value` against a stored array, thinned by `step`, within tol × its maximum."""
    got = np.asarray(value.detach() if hasattr(value, "detach") else value, float)
    want, top = CASES[key].astype(float), np.abs(CASES[key]).max()
    if key + ".stats" in CASES:
        mean, std, top = CASES[key + ".stats"]
        near = max(tol, 1e-7) * top
        assert abs(got.mean() - mean) <= near and abs(got.std() - std) <= near, key
    if step == 1:
        assert got.shape == want.shape, key
    got = got.reshape(-1)[::step]
    assert np.abs(got - want.reshape(-1)).max() <= tol * max(top, 1e-30), key


@pytest.fixture(scope="module")
def nets():
    """Networks by layout, built once; `biased` sets the loc head's bias."""
    made = {}

    def biased(name: str, off: float) -> AFSD:
        if name not in made:
            layout = json.loads((DATA / f"{name}.layout.json").read_text())
            state = {k: torch.from_numpy(v) for k, v in recipe.state_dict(layout).items()}
            made[name] = load_official(state), state[HEAD + "loc_head.conv1d.bias"].clone()
        net, bias = made[name]
        with torch.no_grad():
            net.detector.loc_head.conv1d.bias.copy_(bias + off)
        net.zero_grad(set_to_none=True)
        return net
    return biased


@pytest.mark.parametrize("case", ["pool0", "pool1"])
def test_pool(case):
    S = torch.from_numpy(CASES[f"{case}.windows"])
    x = N(f"{case}.x", *CASES[f"{case}.d_x"].shape).double()
    if case == "pool0":
        x = (x * 2).round() / 2
    x.requires_grad_()
    y = boundary_max_pool(x, S)
    y.backward(N(f"{case}.grad", *CASES[f"{case}.out"].shape).double())
    check(f"{case}.out", y, 1e-12)
    check(f"{case}.d_x", x.grad, 1e-12)


def test_trunk(nets):
    trunk = nets("thumos14", 0.0).trunk
    x, maps = N("trunk0.x", 1, 3, 17, 40, 33).requires_grad_(), {}
    names = {"Conv3d_2c_3x3": 4999, "Mixed_4f": 499, "Mixed_5c": 211}
    hooks = [getattr(trunk, n).register_forward_hook(lambda m, i, o, n=n: maps.update({n: o})) for n in names]
    middle, last = trunk(x)
    for hook in hooks:
        hook.remove()
    assert middle is maps["Mixed_4f"] and last is maps["Mixed_5c"]
    for n, step in names.items():
        assert list(maps[n].shape) == CASES[f"trunk0.{n}.shape"].tolist()
        check(f"trunk0.{n}", maps[n], 1e-4, step)
    (last * N("trunk0.grad", *last.shape)).sum().div(last.detach().abs().max()).backward()
    check("trunk0.d_x", x.grad, 1e-3, 211)
    check("trunk0.d_conv1", trunk.Conv3d_1a_7x7.conv3d.weight.grad, 1e-3, 503)


def check_output(case: str, out: Output, small: int, large: int):
    for key, value in out._asdict().items():
        if f"{case}.{key}" not in CASES:
            assert key == "priors"
            continue
        whole = value.numel() <= 999
        step = large if key.startswith(("start", "end")) else 1 if whole else small
        check(f"{case}.{key}", value, 1e-4, step)


@pytest.mark.parametrize(("case", "name", "off"), [("heads0", "thumos14", 2.0), ("anet0", "anet", 0.3)])
def test_heads(nets, case, name, off):
    net, tag = nets(name, off).detector, str(CASES[f"{case}.tag"])
    shapes = {"c4": (1, 832, 32, 6, 6), "c5": (1, 1024, 16, 3, 3)} if case == "heads0" else {"c5": (1, 1024, 32, 3, 3)}
    maps = {k: N(f"{tag}.{k}", *s).abs().requires_grad_() for k, s in shapes.items()}
    out = net(list(maps.values()))
    frames = out.start.shape[1]
    level, frame = proposal_windows(out.loc.detach(), [32, 16, 8, 4, 2, 1], frames)
    assert np.array_equal(level.numpy(), CASES[f"{case}.level_windows"])
    assert np.array_equal(frame.numpy(), CASES[f"{case}.frame_windows"])
    check_output(case, out, 7, 211)
    loss = sum((getattr(out, k) * N(f"{case}.g.{k}", *getattr(out, k).shape)).sum()
               for k in ("conf", "prop_loc", "prop_conf", "center", "start", "end"))
    loss = loss + (out.loc.log() * N(f"{case}.g.loc", *out.loc.shape)).sum()
    loss.backward()
    for k, x in maps.items():
        check(f"{case}.d_{k}", x.grad, 1e-3, 1499)
        x.grad = None
    for key, part, step in (
            ("loc_head", net.loc_head, 23), ("deconv0", net.deconv[0], 7919),
            ("lr_conv", net.loc_proposal_branch.lr_conv[0], 5003),
            ("proposal_conv", net.conf_proposal_branch.proposal_conv[0], 9973), ("pyramid5", net.pyramids[5][0], 7919)):
        check(f"{case}.d_{key}", part.conv1d.weight.grad, 1e-3, step)
    check(f"{case}.d_scale", torch.cat([s.scale.grad for s in net.loc_heads]), 1e-3)
    # the pass of the contrastive loss: only what it needs
    pieces = torch.from_numpy(CASES[f"{case}.bcl.segments"])[None]
    salient = net.salient(list(maps.values()))
    for i, triple in enumerate(contrast_features(salient, pieces, 4)):     # official: 4 in both layouts
        for key, value in zip("apn", triple):
            check(f"{case}.bcl.{key}{i}", value, 1e-4)
    terms = [contrast_loss(salient, pieces, 4, [w if i == j else 0.0 for j, w in enumerate((1, .1, .1))])
             for i in range(3)]
    np.testing.assert_allclose([t.item() for t in terms], CASES[f"{case}.bcl.terms"], rtol=1e-4)
    sum(terms).backward()
    for k, x in maps.items():
        check(f"{case}.bcl.d_{k}", x.grad, 1e-3, 1499)


def test_whole_network(nets):
    net = nets("thumos14", 1.5)
    tag = "afsd." + str(CASES["net0.tag"])
    x = torch.from_numpy(recipe.uniform(f"{tag}.x", (1, 3, 128, 96, 96), -1, 1))
    with torch.no_grad():
        check_output("net0", net(x), 3, 499)


def test_training_step(nets):
    net, tag = nets("thumos14", 2.0).detector, str(CASES["step0.tag"])
    maps = [N(f"{tag}.c4", 1, 832, 64, 6, 6).abs().requires_grad_(),
            N(f"{tag}.c5", 1, 1024, 32, 3, 3).abs().requires_grad_()]
    gt = torch.from_numpy(CASES["step0.gt"])
    scaled = torch.cat([gt[:, :2] / 256, gt[:, 2:]], 1)
    out = net(maps)
    label, target = assign(out.priors[0, :, 0], pad_truth([scaled]), 256)
    losses = detection_losses(out, label, target, detach_quality=False)
    start, end = activation_losses(out, boundary_targets(gt[:, :2], 256)[None])
    trip = contrast_loss(net.salient(maps), torch.from_numpy(CASES["step0.pieces"])[None], 4)
    total = total_loss(losses, start, end, trip)
    got = [v.item() for v in (*losses, start, end, trip, total)]
    np.testing.assert_allclose(got, CASES["step0.losses"], rtol=1e-4)
    total.backward()
    check("step0.d_c4", maps[0].grad, 1e-3, 1499)
    check("step0.d_c5", maps[1].grad, 1e-3, 1499)
    own = dict(net.named_parameters())
    norms = [own[n].grad.double().norm().item() for n in CASES["step0.grad_names"]]
    np.testing.assert_allclose(norms, CASES["step0.grad_norms"], rtol=1e-3, atol=1e-6 * max(norms))


def drawn(name: str, clips: int, levels, classes: int, frames: int, spread=2.0) -> Output:
    P = sum(levels)
    scale = {"loc": (N(f"{name}.loc", clips, P, 2) * 0.8 + np.log(frames / 12)).exp(),
             "conf": N(f"{name}.conf", clips, P, classes, scale=spread),
             "prop_loc": N(f"{name}.prop_loc", clips, P, 2, scale=0.4),
             "prop_conf": N(f"{name}.prop_conf", clips, P, classes, scale=spread),
             "center": N(f"{name}.center", clips, P, 1, scale=1.5)}
    for k, v in scale.items():
        scale[k] = v.float()
    return Output(**scale, priors=priors(levels)[None, :, None], **dict.fromkeys(Output._fields[6:]))


@pytest.mark.parametrize("case", ["loss0", "loss1", "anet.loss0", "anet.loss1"])
def test_losses(case):
    anet = case.startswith("anet")
    levels, K, frames, theta = (AN_LEVELS, 2, 768, 0.6) if anet else (T14_LEVELS, 21, 256, 0.5)
    gt = CASES[f"{case}.gt"]
    clips = CASES[f"{case}.label"].size // sum(levels)
    out = drawn(case, clips, levels, K, frames)
    leaves = {k: getattr(out, k).clone().requires_grad_() for k in ("loc", "conf", "prop_loc", "prop_conf", "center")}
    out = out._replace(**leaves)
    truth = pad_truth([gt[gt[:, 0] == b, 1:] for b in range(clips)])
    label, target = assign(priors(levels), truth, frames, anet_ranges(levels) if anet else None)
    assert np.array_equal(label.flatten(), CASES[f"{case}.label"].ravel())
    refined = refined_label(out.loc, label, target, theta, anet)
    assert np.array_equal(refined.flatten(), CASES[f"{case}.refined_label"].ravel())
    np.testing.assert_allclose(target.reshape(-1, 2)[::3], CASES[f"{case}.target"], rtol=1e-5, atol=1e-4)
    losses = detection_losses(out, label, target, theta, per_clip=anet, smooth=anet, detach_quality=False)
    np.testing.assert_allclose([v.item() for v in losses], CASES[f"{case}.values"], rtol=1e-5)
    for name, value in losses._asdict().items():
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        for k, g in zip(leaves, grads):
            key = f"{case}.{name}.d_{k}"
            if key in CASES:
                check(key, g, 1e-3, 29 if k.endswith("conf") else 3)
            else:
                assert g is None or not g.any(), key


@pytest.mark.parametrize(("case", "frames", "stride"), [("act0", 256, 4), ("anet.act0", 768, 8)])
def test_activation(case, frames, stride):
    start, end = (N(f"{case}.{k}", 2, frames, 16).abs().requires_grad_() for k in ("start", "end"))
    wanted = torch.from_numpy(recipe.uniform(f"afsd.{case}.gt", (2, 2 if stride == 4 else 3, frames)) < 0.1).float()
    down = wanted[..., ::stride]
    assert np.array_equal(down.numpy(), CASES[f"{case}.down"])
    level = torch.zeros(2, frames // stride, 16)
    out = Output(*[None] * 6, start, end, *[level] * 4)
    values = activation_losses(out, wanted[:, -2:], level=0.0)
    np.testing.assert_allclose([v.item() for v in values], CASES[f"{case}.values"], rtol=1e-5)
    (values[0] + 2 * values[1]).backward()
    check(f"{case}.d_start", start.grad, 1e-3, 53)
    check(f"{case}.d_end", end.grad, 1e-3, 53)


def test_triplet():
    a, p, n = (N(f"trip0.{k}", 1, 256, scale=0.1).requires_grad_() for k in "apn")
    # a map in which the windows of the pieces find a, p and n; a constant makes them largest and cancels
    pieces = torch.tensor([[[2.0, 10], [20, 28], [14, 16]]])
    x = torch.zeros(1, 512, 32)
    x = x + torch.nn.functional.one_hot(torch.tensor(10), 32) * torch.cat([a * 0, a + 9], 1)[..., None]
    x = x + torch.nn.functional.one_hot(torch.tensor(20), 32) * torch.cat([p + 9, p * 0], 1)[..., None]
    x = x + torch.nn.functional.one_hot(torch.tensor(14), 32) * torch.cat([n + 9, n * 0], 1)[..., None]
    value = contrast_loss([x], pieces, 4, [1.0])
    np.testing.assert_allclose(value.item(), CASES["trip0.value"], rtol=1e-5)
    value.backward()
    for k, v in zip("apn", (a, p, n)):
        check(f"trip0.d_{k}", v.grad, 1e-3, 3)


def test_clips():
    source, names = CASES["clips.in_annos"], CASES["clips.in_videos"].tolist()
    clips = afsd.Clips([(int(count), source[source[:, 0] == v, 1:]) for v, count in enumerate(
        CASES["clips.in_sample_count"])], lambda i, first, rng: torch.zeros(1, 256), afsd.PLANS["thumos14"], 1)
    annos, starts, ends, shortest = [], [], [], {}
    for k, (v, _, rows, w) in enumerate(clips.clips):
        annos += [[k, *row] for row in rows]
        s, e = boundary_targets(rows[:, :2], 256).numpy().astype(bool)
        starts.append(s)
        ends.append(e)
        shortest[names[v]] = w
    assert [names[v] for v, *_ in clips.clips] == CASES["clips.video"].tolist()
    assert [first for _, first, *_ in clips.clips] == CASES["clips.offset"].tolist()
    batch = clips.__getitems__([0, 1])
    assert np.array_equal(batch["wanted"][:, 0].bool(), starts[:2]) and np.allclose(
        batch["truth"][0, 0] * torch.tensor([256, 256, 1]), clips.clips[0][2][0])
    np.testing.assert_allclose(annos, CASES["clips.annos"], atol=1e-9)
    assert np.array_equal(np.packbits(starts, axis=1), CASES["clips.start"])
    assert np.array_equal(np.packbits(ends, axis=1), CASES["clips.end"])
    assert [shortest[n] for n in names] == CASES["clips.shortest"].tolist()


@pytest.mark.parametrize("case", ["cut0", "cut1", "anet.cut0"])
def test_insertion(case):
    choices = iter(CASES[f"{case}.choices"].tolist())
    frames = len(CASES[f"{case}.frames"])
    done = insert_background(CASES[f"{case}.annos"][:, :2], int(CASES[f"{case}.w"]), frames,
                             lambda n: next(choices) % n, strict=not case.startswith("anet"))
    assert (done is not None) == bool(CASES[f"{case}.done"])
    assert np.array_equal(done.frames, CASES[f"{case}.frames"])
    np.testing.assert_allclose(done.pieces, CASES[f"{case}.pieces"], atol=1e-9)


def rows_of(found, video: int, label: bool = True):
    return np.column_stack([np.full(len(found.score), video), found.label, found.segment, found.score]).astype(float)


@pytest.mark.parametrize(("case", "streams", "step"), [("test0", ["rgb"], 17), ("fuse0", ["rgb", "flow"], 11)])
def test_thumos_detections(case, streams, step):
    rows, n = [], 0
    for video, count in enumerate(CASES[f"{case}.sample_count"].tolist()):
        offsets = clip_offsets(count, 256, 128)
        outs = []
        for s in streams:
            windows = [drawn(f"{case}.{s}.{n + i}", 1, T14_LEVELS, 21, 256, 2.5) for i in range(len(offsets))]
            outs.append(windows[0]._replace(**{k: torch.cat([getattr(w, k) for w in windows]) for k in
                                               ("loc", "conf", "prop_loc", "prop_conf", "center")}))
        n += len(offsets)
        rows.append(rows_of(detect(*outs, offsets=offsets, fps=10, keep_last=False), video))
    rows = np.concatenate(rows)
    assert len(rows) == CASES[f"{case}.count"]
    np.testing.assert_allclose(rows[::step], CASES[f"{case}.rows"], atol=2e-4)
    np.testing.assert_allclose(rows.sum(0), CASES[f"{case}.sum"], atol=2e-4 * len(rows))


@pytest.mark.parametrize(("case", "streams"), [("anet.test0", ["rgb"]), ("anet.fuse0", ["rgb", "flow"])])
def test_anet_detections(case, streams):
    (count, fps, duration), = CASES[f"{case}.videos"]
    outs = [drawn(f"{case}.{s}.0", 1, AN_LEVELS, 2, 768, 2.5) for s in streams]
    lowest, floor = (1e-9, 1e-9) if len(streams) == 1 else (0, 1e-18)
    found = detect(*outs, offsets=[0], fps=fps, frames=768, sigma=0.85, lowest=lowest, floor=floor,
                   keep_last=False, geometric=True)
    scores = torch.from_numpy(recipe.uniform(f"afsd.{case}.cls.xa", (5,)))
    rows = rows_of(name_detections(found, scores, duration), 0)
    assert len(rows) == CASES[f"{case}.count"]
    np.testing.assert_allclose(rows[::5], CASES[f"{case}.rows"], atol=1e-3)
    np.testing.assert_allclose(rows.sum(0), CASES[f"{case}.sum"], atol=1e-3 * len(rows))


@pytest.mark.parametrize("case", ["rand", "two", "one", "ties", "zero"])
@pytest.mark.parametrize(("sigma", "key"), [(0.5, "out"), (0.85, "85.out")])
def test_soft_nms(case, sigma, key):
    x = torch.from_numpy(CASES[f"nms.{case}.in"])
    top_k = 7 if (case, sigma) == ("rand", 0.85) else 5000
    kept = soft_nms(x[None, :, :2], x[None, :, 2], sigma, top_k=top_k, keep_last=False)[0]
    got = torch.cat([x[:, :2], kept[:, None]], 1)[kept > 0]
    want = CASES[f"nms.{case}.{key}"]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("case", ["eval0", "eval1"])
def test_evaluator(case):
    gt, det = CASES[f"{case}.gt"], CASES[f"{case}.det"]
    gt, det = (x[np.argsort(x[:, 0], kind="stable")] for x in (gt, det))
    result = mean_ap({"video": gt[:, 0], "label": gt[:, 1], "segment": gt[:, 2:4]},
                     {"video": det[:, 0], "label": det[:, 1], "segment": det[:, 2:4], "score": det[:, 4]},
                     CASES[f"{case}.tiou"])
    columns = [result.classes.tolist().index(c) for c in CASES[f"{case}.classes"]]
    np.testing.assert_allclose(result.ap[:, columns], CASES[f"{case}.ap"], atol=1e-9)
    np.testing.assert_allclose(result.mAP, CASES[f"{case}.mAP"], atol=1e-9)
    assert abs(result.average - float(CASES[f"{case}.average"])) < 1e-9


def test_thresholds_are_the_protocols():
    np.testing.assert_allclose(afsd.THUMOS14_TIOU, CASES["eval0.tiou"], atol=1e-12)
    np.testing.assert_array_equal(afsd.ACTIVITYNET_TIOU, CASES["eval1.tiou"])
