"""CMR: fast forms equal literal ones, exact symmetries, weights, data, settings, a run, apply."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facebook_nb import cmr
from facebook_nb.cmr import CME, ROWS, SME, TIM, Config, Parts, motion_map, small_network, temporal_mix
from facebook_nb.experiment import Claim
from facebook_nb.files import UserError, write_image, write_weights
from facebook_nb.readers.video import FrameArray
from facebook_nb.worlds.motion import two_sweeps, write_video

N, T, C, H, W = 2, 4, 19, 5, 3


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


def gradients(out, *inputs):
    return torch.autograd.grad((out * noise(*out.shape, dtype=out.dtype)).sum(), inputs)


def literal_tim(x, weight, gate=None):
    x = x.unflatten(0, (-1, T))
    x = x if gate is None else x * gate[..., None, None]
    y = F.conv1d(x.permute(0, 3, 4, 2, 1).reshape(-1, x.shape[2], T), weight, padding=1, groups=x.shape[2])
    return y.reshape(N, H, W, x.shape[2], T).permute(0, 4, 3, 1, 2).flatten(0, 1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_temporal_mix(gated, layout):
    x = noise(N * T, C, H, W).contiguous(memory_format=layout).requires_grad_()
    w, gate = noise(C, 3).requires_grad_(), noise(N, T, C).sigmoid().requires_grad_()
    inputs = (x, w, gate) if gated else (x, w)
    fast, slow = temporal_mix(x, w, gate if gated else None, T), literal_tim(x, w[:, None], gate if gated else None)
    torch.testing.assert_close(fast, slow)
    for a, b in zip(gradients(fast, *inputs), gradients(slow, *inputs)):
        torch.testing.assert_close(a, b)


def test_replicate_padding_repeats_the_ends():
    x, w, gate = noise(N * T, C, H, W).requires_grad_(), noise(C, 3).requires_grad_(), noise(N, T, C).sigmoid()
    y = temporal_mix(x, w, gate, T, replicate=True)
    u = x.unflatten(0, (-1, T)) * gate[..., None, None]
    u = torch.cat([u[:, :1], u, u[:, -1:]], 1)
    slow = sum(w[:, k, None, None] * u[:, k : k + T] for k in range(3)).flatten(0, 1)
    torch.testing.assert_close(y, slow)
    for a, b in zip(gradients(y, x, w), gradients(slow, x, w)):
        torch.testing.assert_close(a, b)
    still = torch.rand(1, 1, 3, 24, 24).expand(-1, 8, -1, -1, -1)
    for padding, uniform in (("zero", False), ("replicate", True)):
        net = small_network(8, Parts(cme=True, sme=True, padding=padding))
        maps = cmr.motion_maps(net, still)
        d = torch.stack([v for k, v in maps.items() if k.endswith("discrepancy")])
        assert ((d - 1 / 8).abs().max() < 1e-6) == uniform


def literal_map(x):
    x = x.unflatten(0, (-1, T))
    s = F.cosine_similarity(x[:, :-1], x[:, 1:], dim=2, eps=1e-8)
    return 1 - torch.cat([s, s[:, -1:]], 1)


def test_motion_map_and_its_gradient():
    x = noise(N * T, C, H, W).relu().requires_grad_()
    torch.testing.assert_close(motion_map(x, T), literal_map(x))
    torch.testing.assert_close(gradients(motion_map(x, T), x)[0], gradients(literal_map(x), x)[0])
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)).to(kind)
        x[1, :, 0, 0], x[0, :, 1, 1] = 0, 6e-8      # no direction; one whose 1/n exceeds half precision
        x.requires_grad_()
        seen = motion_map(x, 2)
        assert (seen[..., 0, 0] == 1).all()
        d_x, = torch.autograd.grad(seen.sum(), x)
        assert d_x.isfinite().all() and (d_x[:, :, 0, 0] == 0).all()
    with pytest.raises(UserError, match="at least 2"):
        motion_map(x, 1)


@pytest.mark.parametrize("training", [False, True])
def test_sme_is_its_literal_form(training):
    module = SME(C).double().train(training)
    module.W[1].weight.data = noise(C)
    x = noise(N * T, C, H, W).relu().requires_grad_()
    out = module(x, T)
    slow = x + module.W(literal_map(x).flatten(0, 1)[:, None] * x)
    torch.testing.assert_close(out, slow)
    torch.testing.assert_close(gradients(out, x)[0], gradients(slow, x)[0])
    assert (SME(C).double()(x, T) == x).all()                # starts as the identity


@pytest.mark.parametrize("training", [False, True])
def test_cme_is_its_literal_form(training):
    module = CME(16).double().train(training)
    x = noise(N * T, 16, H, W).requires_grad_()

    def literal():
        conv, norm = module.reduce
        both = F.batch_norm(F.conv2d(x, conv.weight), norm.running_mean.clone(), norm.running_var.clone(),
                            norm.weight, norm.bias, training)
        q, z = (v.relu().mean((2, 3)).reshape(N, T, 2) for v in (both[:, :2], both[:, 2:]))
        z_hat = z.clone()
        for n in range(N):
            for i in range(T):
                for j in range(T):
                    a = q[n] @ q[n, j]
                    z_hat[n, i] = z_hat[n, i] + (-a).softmax(0)[i] * z[n, j]
        return module.inflate(z_hat.reshape(-1, 2, 1, 1)).relu().sigmoid().reshape(N, T, 16)

    gate = module(x, T)
    torch.testing.assert_close(gate, literal())
    torch.testing.assert_close(gradients(gate, x)[0], gradients(literal(), x)[0])
    assert gate.min() >= 0.5 and gate.max() < 1


def test_bf16_and_channels_last_agree():
    torch.manual_seed(0)
    net = small_network(8, ROWS["CMR"]).eval()
    x = noise(2, 8, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        plain = net(x)
        last = net.to(memory_format=torch.channels_last)(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x).float()
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, half, rtol=0.1, atol=0.05)


def trained(row, seed=0):
    """A network whose every part matters, without training it."""
    torch.manual_seed(seed)
    net = small_network(8, ROWS[row])
    for m in net.modules():
        if isinstance(m, SME):
            torch.nn.init.ones_(m.W[1].weight)
        if isinstance(m, TIM):
            torch.nn.init.normal_(m.weight)
    return net.eval()


@pytest.mark.parametrize("row, blind", [("TSN", True), ("TSN+CME", True), ("TSN+SME", False), ("TSM", False),
                                        ("TIM", False), ("TIM+ME", False), ("TIM+CMM", False), ("CMR", False)])
def test_what_sees_the_order_of_frames(row, blind):
    net, x = trained(row).double(), noise(2, 8, 3, 32, 32)
    with torch.no_grad():
        gap = (net(x) - net(x[:, torch.randperm(8)])).abs().max()
    assert gap < 1e-12 if blind else gap > 1e-6
    assert ROWS[row].blind == blind


def test_every_row_trains_and_takes_both_inputs():
    x = noise(2, 8, 3, 32, 32, dtype=torch.float32)
    for name, parts in ROWS.items():
        net = small_network(5, parts).train()
        F.cross_entropy(net(x), torch.tensor([1, 2])).backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters()), name
        net.eval()
        torch.testing.assert_close(net(x), net(x.reshape(2, 24, 32, 32)))


@pytest.mark.parametrize("row", ["TIM", "CMR"])
@pytest.mark.parametrize("shape", [(2, 1, 3, 24, 24), (16, 3, 24, 24), (2, 3, 8, 24, 24), (2, 8, 24, 24)])
def test_clips_of_another_shape_are_refused(row, shape):
    with pytest.raises(UserError, match=r"shape \(\d+, .*wanted are \(N, T, 3, H, W\)"):
        small_network(8, ROWS[row]).eval()(torch.zeros(shape))
    assert small_network(8, ROWS["TSN"]).eval()(torch.zeros(2, 1, 3, 24, 24)).shape == (2, 8)


def test_the_authors_order_of_work_gives_the_same():
    net, x = trained("CMR").double(), noise(2, 8, 3, 24, 24)
    with torch.no_grad():
        ours = net(x)
        torch.testing.assert_close(cmr.as_released(net)(x), ours)


def test_clips_do_not_mix():
    net, x = trained("CMR"), noise(3, 8, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-6)


def test_sizes_of_the_papers_network():
    with torch.device("meta"):
        net = cmr.resnet(50, 174)
    count = sum(p.numel() for p in net.parameters())
    assert count == pytest.approx(35.5e6, rel=2e-3)
    blocks = [b for k in range(1, 5) for b in getattr(net, f"layer{k}")]
    assert sum(b.cme is not None for b in blocks) == sum(b.tim is not None for b in blocks) == 16
    assert [b.sme is not None for b in blocks].count(True) == 4
    with torch.device("meta"):
        deep = cmr.resnet(101, 10)
    assert [b.tim is not None for b in deep.layer3[:4]] == [True, False, True, False]
    assert cmr.cost(small_network(8, Parts("none")), 8, 32)["parameters"] == 57048


def official(classes=3):
    """A state dict in the authors' layout, made from ours."""
    state = {}
    for name, value in cmr.resnet(50, classes).state_dict().items():
        name = name.replace(".cme.inflate.", ".trans_att.conv_inflate.").replace(".tim.", ".shift_conv.")
        name = name.replace(".sme.", ".spatial_att.")
        if name.startswith("fc."):
            state["new_" + name] = value
            continue
        parts = name.split(".")
        if parts[0].startswith("layer") and parts[2] not in ("trans_att", "shift_conv", "spatial_att", "cme"):
            name = ".".join([*parts[:2], "net", *parts[2:]])
        if ".cme.reduce." in name:
            for k, branch in enumerate("qk"):
                half = value if value.ndim == 0 else value.chunk(2)[k]
                state["base_model." + name.replace("cme.reduce", f"trans_att.conv1_reduce_{branch}")] = half
        else:
            state["base_model." + name] = value
    return state


def test_official_checkpoint_as_it_was_saved(tmp_path):
    state = official()
    torch.save({"epoch": 3, "best_prec1": 1.0, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
                "model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth.tar")
    net = cmr.load_official(tmp_path / "a.pth.tar")
    assert net.fc.out_features == 3 and not net.training
    for change, message in [({"new_fc.bias": None}, "fc.bias"), ({"extra": torch.ones(1)}, "extra"),
                            ({"base_model.conv1.weight": torch.ones(1)}, "conv1.weight"),
                            ({"base_model.layer1.0.trans_att.conv1_reduce_q.0.weight": None}, "second branch")]:
        bad = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            cmr.load_official(bad)
    with pytest.raises(UserError, match="network"):
        cmr.load_official(state, network="vgg")


def test_imagenet_start():
    with torch.device("cpu"):
        plain = cmr.resnet(50, 1000, Parts("none")).state_dict()
    net = cmr.resnet(50, 7)
    before = net.layer1[0].tim.weight.clone(), net.fc.weight.clone()
    cmr.load_imagenet(net, plain)
    assert (net.layer4[2].conv3.weight == plain["layer4.2.conv3.weight"]).all()
    assert (net.layer1[0].tim.weight == before[0]).all() and (net.fc.weight == before[1]).all()
    plain.pop("layer2.1.bn2.bias")
    with pytest.raises(UserError, match="layer2.1.bn2.bias"):
        cmr.load_imagenet(net, plain)


def test_views_and_consensus(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    np.save(tmp_path / "a.npy", frames)
    clip = FrameArray(tmp_path / "a.npy")
    one = cmr.views(clip, 8)
    assert one.shape == (1, 8, 224, 224, 3)
    many = cmr.views(clip, 8, clips=10, crops=3)
    assert many.shape == (30, 8, 256, 256, 3) and (many == cmr.views(clip, 8, 10, 3)).all()
    whole = cmr.resize(frames[cmr.segment_indices(30, 8)], 340, 256)
    assert (many[0].numpy() == whole[:, :, :256]).all() and (many[10].numpy() == whole[:, :, 84:340]).all()
    assert (many[20].numpy() == whole[:, :, 42:298]).all()
    logits = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert cmr.consensus(logits)[0] > cmr.consensus(logits, "softmax")[0]
    assert cmr.consensus(logits).sum() == pytest.approx(1)


def test_settings_name_what_is_wrong():
    for key, value, message in [("clip", 3, "no setting 'clip'"), ("clips", "many", "clips"), ("data", "x", "data")]:
        with pytest.raises(UserError, match=message):
            Config.preset("book", **{key: value})
    assert Config.preset("full", start="null").start is None       # as the error for missing weights proposes
    with pytest.raises(UserError, match="TSM"):
        cmr.run(Config.preset("smoke", rows=("TSMM",)))


def test_full_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="data_root.*resnet50-19c8e357.pth"):
        cmr.run(Config.preset("full"))
    assert not cmr.check_data(tmp_path).usable
    assert "none of the layouts" in str(cmr.check_data(tmp_path))


def something(root, clips=6):
    """A tiny copy of Something-Something V1."""
    base = "something-something-v1"
    names = ["Pushing it", "Dropping it", "Turning it"]
    (root / f"{base}-labels.csv").write_text("\n".join(names))
    world = two_sweeps(clips, 0)
    for split, k in (("train", 0), ("validation", clips // 2)):
        (root / f"{base}-{split}.csv").write_text("\n".join(f"{i};{names[i % 3]}" for i in range(k, k + clips // 2)))
    for i in range(clips):
        for j, frame in enumerate(world.frames[i][:10], 1):
            write_image(root / f"20bn-{base}" / str(i) / f"{j:05d}.jpg", frame)
    return root


def test_full_on_a_tiny_copy(tmp_path):
    root = something(tmp_path)
    found = cmr.check_data(root)
    assert found.usable and "3 classes" in str(found)
    torch.save(cmr.resnet(50, 1000, Parts("none")).state_dict(), root / "resnet50-19c8e357.pth")
    config = Config.preset("full", data_root=root, rows=("CMR",), steps=1, batch_size=2, side=32, workers=0,
                           precision="no", out_dir=tmp_path / "run")
    report = cmr.run(config)
    assert set(report.metrics["CMR"]) == {"top-1", "top-5"} and report.claim.verdict == "undecided"
    again = cmr.run(Config.preset("full", data_root=root, rows=("CMR",), steps=1, batch_size=2, side=32, workers=0,
                                  precision="no", out_dir=tmp_path / "run"))
    assert again.metrics == report.metrics
    rows = cmr.apply([root / "20bn-something-something-v1" / "0"], tmp_path / "run" / "weights.safetensors",
                     tmp_path / "out")
    assert rows[0]["label"] in ("Pushing it", "Dropping it", "Turning it")
    (root / "20bn-something-something-v1" / "4" / "00005.jpg").unlink()
    clip = cmr.open_clip(root / "20bn-something-something-v1" / "4")
    with pytest.raises(UserError, match="frame number 5 is missing"):
        clip.read(range(10))


def test_a_mirrored_clip_changes_left_and_right(tmp_path):
    found = cmr.read_something(something(tmp_path), "train")
    found.labels[:] = 86
    config = Config.preset("full", data_root=tmp_path, side=32, flip=True)
    torch.manual_seed(0)
    seen = [cmr.VideoBatches(found, config)[0] for _ in range(12)]
    assert {label for _, label in seen} == {86, 87} and seen[0][0].shape == (8, 32, 32, 3)
    other = replace(config, data="kinetics")
    assert {cmr.VideoBatches(found, other)[0][1] for _ in range(8)} == {86}


TINY = dict(rows=("TSN", "CMR"), clips=16, test_clips=16, steps=2, harder_clips=16, swell_rows=())


def test_a_run_repeats_and_resumes(tmp_path):
    one = cmr.run(Config.preset("smoke", out_dir=tmp_path / "a", **TINY))
    steps = tmp_path / "a" / "steps" / "seed0" / "CMR"
    assert {p.stem for p in steps.iterdir()} == {"first", "second-1", "measured"}
    first = (steps / "first.npz").stat().st_mtime_ns
    (steps / "second-1.npz").unlink()
    (tmp_path / "a" / "steps" / "seed0" / "TSN" / "first.npz").unlink()
    two = cmr.run(Config.preset("smoke", out_dir=tmp_path / "a", **TINY))
    assert two.metrics == one.metrics and (steps / "first.npz").stat().st_mtime_ns == first
    saved = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert saved["chapter"] == "cmr" and set(saved["metrics"]) == {"TSN", "CMR", "single frames"}
    assert saved["roles"] == {"single frames": "trivial", "TSN": "trivial"}
    assert (tmp_path / "a" / "weights.safetensors").stat().st_size < 1.5e6


def test_both_worlds_and_the_curve(tmp_path):
    config = Config.preset("smoke", out_dir=tmp_path, **TINY | dict(
        rows=("TIM", "TIM+SME", "CMR"), n_seeds=2, curve_steps=(2,), curve_rows=("TIM",), curve_seeds=1,
        swell_rows=("TIM", "TIM+CME")))
    report = cmr.run(config)
    count = {row: {k: len(v) for k, v in found.items()} for row, found in report.metrics.items()}
    assert count["TIM"]["top-1"] == count["TIM"]["swells top-1"] == 2 and count["TIM"]["2 steps"] == 1
    assert {"map rank", "map rank elsewhere"} <= set(count["TIM+SME"]) and "still ends" in count["CMR"]
    assert "2 steps" not in count["CMR"] and set(count["TIM+CME"]) == {k for k in count["TIM+CME"] if "swells" in k}
    assert report.metrics["TIM"]["1 steps"] == report.metrics["TIM"]["top-1"]
    assert report.claim.n == 2 and report.claim.text.endswith("CMR − TIM")
    assert [f.text.split(": ")[1] for f in report.findings] == ["TIM+CME − TIM"]
    bare, second = (report.arrays[f"0/TIM/{k}loss"] for k in ("swells ", ""))
    assert len(bare) == 1 and len(second) == 3


def test_the_second_stage_goes_on_from_the_first(monkeypatch):
    config, seen, real = Config.preset("smoke", **TINY), [], cmr.train

    def spy(settings, network, clips, seed, steps, rate, folder=None):
        seen.append((steps, rate, clips.frames.clone(), network.fc.weight.detach().clone()))
        return real(settings, network, clips, seed, steps, rate, folder)

    monkeypatch.setattr(cmr, "train", spy)
    begun = cmr.first_stage(config, "sweeps", "TIM", 3, 2)
    for steps in (1, 2):
        cmr.second_stage(config, "TIM", 3, begun, steps)
    assert [(n, rate) for n, rate, *_ in seen] == [(2, 1e-2), (1, 5e-3), (2, 5e-3)]
    assert torch.equal(seen[1][3], seen[2][3]) and torch.equal(seen[1][3], begun["weight.fc.weight"])
    draw = lambda **kwargs: torch.as_tensor(two_sweeps(16, 5003, "train", config.side, **kwargs).frames)
    assert torch.equal(seen[0][2], draw(clutter=0)) and torch.equal(seen[1][2], draw(clutter=3, start=16))


def test_a_row_that_is_blind_to_order_does_not_begin_again():
    config = Config.preset("smoke", **TINY | dict(starts=2))
    assert [cmr.first_stage(config, "sweeps", row, 0, 1)["starts"] for row in ("TSN", "TIM")] == [1, 2]


def test_ranks_in_a_map():
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    at = lambda x, y: cmr.rank_at(maps, torch.tensor([[[x, y]]]) / 4)
    assert at(3.5, 3.5) == pytest.approx(15.5 / 16) and at(0.0, 0.0) == pytest.approx(0.5 / 16)
    assert at(1.2, 0.0) == pytest.approx(1.5 / 16) and np.isnan(at(4.5, 0.0))


def test_benchmark_counts_and_times():
    plain, ours = cmr.benchmark(("TSN", "CMR"), T=2, side=64, repeats=1)
    assert plain["row"] == "TSN" and 0 < plain["seconds"] and 0 < ours["seconds"]
    with torch.device("meta"):
        plain, ours = (cmr.cost(cmr.resnet(50, 174, ROWS[row]), 2, 64) for row in ("TSN", "CMR"))
    assert ours["parameters"] > 1.4 * plain["parameters"] and 1.3 < ours["MMAC"] / plain["MMAC"] < 1.5


def test_apply_on_files_and_arrays(tmp_path):
    cmr.run(Config.preset("smoke", out_dir=tmp_path / "run", **TINY))
    weights, film = tmp_path / "run" / "weights.safetensors", two_sweeps(1, 5).frames[0]
    write_video(tmp_path / "good.mp4", film)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    write_image(tmp_path / "still.png", film[0])
    np.save(tmp_path / "grey.npy", np.zeros((9, 20, 30), np.uint8))
    np.save(tmp_path / "rgba.npy", np.zeros((9, 20, 30, 4), np.uint8))
    np.save(tmp_path / "flow.npy", np.zeros((9, 20, 30, 2), np.uint8))
    np.save(tmp_path / "float.npy", np.random.default_rng(0).random((9, 20, 30, 3)))
    np.save(tmp_path / "text.npy", np.full((9, 20, 30, 3), "a"))
    names = ["good.mp4", "bad.mp4", "still.png", "grey.npy", "rgba.npy", "flow.npy", "text.npy", "float.npy"]
    inputs = [tmp_path / n for n in names] + [film, torch.from_numpy(film), film[:1]]
    rows = cmr.apply(inputs, weights, tmp_path / "out")
    for k in (0, 3, 4, 7, 8, 9):
        assert rows[k]["label"] in cmr.CLASSES and sum(rows[k]["scores"].values()) == pytest.approx(1, abs=1e-3)
        assert (tmp_path / "out" / rows[k]["picture"]).exists() and "this book" in rows[k]["weights"]
    assert rows[8]["scores"] == rows[9]["scores"]
    wrong = {1: "not readable as video", 2: "one picture", 5: "2 channels", 6: "text.npy", 10: "a still"}
    for k, message in wrong.items():
        assert message in rows[k]["error"] and "label" not in rows[k]
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())[0])[0] == "input"
    assert cmr.apply(film, weights)[0]["label"] in cmr.CLASSES     # one film, and nothing written
    write_weights(tmp_path / "other.safetensors", {"a": torch.ones(2)})
    with pytest.raises(UserError, match="new_fc"):
        cmr.apply([tmp_path / "good.mp4"], tmp_path / "other.safetensors", tmp_path / "out")


def test_claims_follow_the_numbers():
    row = lambda *top, **more: {"top-1": list(top), **more}
    good = {"TIM": row(0.5, 0.5, 0.5), "CMR": row(0.6, 0.61, 0.62), "TIM+SME": row(0.6, 0.6, 0.61),
            "TIM+SME unmasked": row(0.6, 0.61, 0.6)}
    claim, findings = cmr.claims(good)
    assert isinstance(claim, Claim) and claim.verdict == "shown" and claim.effect == pytest.approx(11)
    assert [f.verdict for f in findings] == ["undecided"]
    assert cmr.claims({**good, "CMR": row(0.4, 0.9, 0.6)})[0].verdict == "undecided"
    assert cmr.claims({**good, "CMR": row(0.50, 0.501, 0.502)})[0].verdict == "refuted"     # of no interest
    checks = cmr.mechanism(Config.preset("book"), {"TSN": row(0.125, 0.126), "TIM+CME": row(
        0.5, 0.5, **{"still ends": [0.4, 0.5], "freezing": [0.04, 0.05]})})
    assert [c.holds for c in checks] == [True, False, False]
