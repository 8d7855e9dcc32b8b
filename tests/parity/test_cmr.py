"""CMR's modules, block, network, comparators, sampling and crops against the reference cases."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb.cmr import CME, ME, ROWS, SME, TIM, Bottleneck, from_official, load_official, motion_map, shift
from facebook_nb.readers.video import crop_offsets, dense_indices, segment_indices
from tests.parity import recipe

DATA = Path(__file__).parent / "data" / "cmr"
CASES = np.load(DATA / "cases.npz")
CME_SHAPES = [(1, 4, 16, 5, 6), (2, 8, 24, 4, 4), (1, 16, 19, 3, 5)]
SME_SHAPES = [(1, 4, 6, 5, 4), (2, 8, 8, 3, 3), (1, 16, 5, 4, 4)]
TIM_SHAPES = [(2, 8, 16, 3, 4), (1, 4, 19, 2, 2)]


def check(key: str, value, tol: float) -> None:
    """`value` against a stored array, whole or thinned, within tol × its maximum."""
    want, got = CASES[key], np.asarray(value.detach() if hasattr(value, "detach") else value)
    top = np.abs(want).max()
    if key + ".stats" in CASES:
        mean, std, top, step = CASES[key + ".stats"]
        near = max(tol, 1e-7) * top         # the mean itself is rounded
        assert abs(got.mean(dtype=float) - mean) <= near and abs(got.std(dtype=float) - std) <= near, key
        got = got.reshape(-1)[::int(step)]
    assert np.abs(got.reshape(want.shape) - want).max() <= tol * max(top, 1e-30), key


def parameters(case: str, names: dict) -> dict:
    return {k: torch.from_numpy(recipe.parameter(f"cmr.{case}.{k}", tuple(v))) for k, v in names.items()}


def draw(name: str, *shape, grad: bool = False, dtype=torch.float32):
    return torch.from_numpy(recipe.normal(name, shape)).to(dtype).requires_grad_(grad)


def official_grads(module, layout) -> dict:
    """Gradients under the authors' names: the two branches cut apart again."""
    ours = {k: p.grad for k, p in module.named_parameters()}
    found = {}
    for name in layout:
        for old, new in (("net.", ""), ("shift_conv", "tim"), ("trans_att.conv_inflate", "cme.inflate"),
                         ("conv_inflate", "inflate"), ("spatial_att", "sme")):
            new_name = name.replace(old, new)
            if new_name in ours:
                found[name] = ours[new_name]
        for k, branch in enumerate("qk"):
            joint = name.replace(f"conv1_reduce_{branch}", "reduce").replace("trans_att", "cme")
            if joint != name and joint in ours:
                found[name] = ours[joint].chunk(2)[k]
    return found


def official_stats(module, names) -> dict:
    class Buffers:
        def named_parameters(self):
            for k, b in module.named_buffers():
                yield k, type("G", (), {"grad": b})
    return official_grads(Buffers(), names)


def check_grads(case, mode, module, x, extra=2e-4):
    check(f"{case}/{mode}/d_x", x.grad, 1e-5)
    prefix = f"{case}/{mode}/d_"
    names = [k.removeprefix(prefix) for k in CASES if k.startswith(prefix) and not k.endswith(".stats")]
    names.remove("x")
    grads = official_grads(module, names)
    assert set(grads) == set(names)
    for name in names:
        if mode == "train" and name.endswith("W.0.bias"):
            assert grads[name].abs().max() <= 1e-4       # a bias before a batch norm
        else:
            check(prefix + name, grads[name], extra)
    if mode == "train":
        prefix = f"{case}/train/"
        names = [k.removeprefix(prefix) for k in CASES if k.startswith(prefix) and ".running_" in k
                 and not k.endswith(".stats")]
        stats = official_stats(module, names)
        assert set(stats) == set(names)
        for name in names:
            check(prefix + name, stats[name], 1e-5)


def cme_layout(c: int) -> dict:
    d, names = c // 8, {}
    for branch in ("conv1_reduce_q", "conv1_reduce_k", "conv_inflate"):
        n, m = (c, d) if branch == "conv_inflate" else (d, c)
        names |= {f"{branch}.0.weight": (n, m, 1, 1)}
        names |= {f"{branch}.1.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")}
    return names


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("i", range(3))
def test_cme(i, mode):
    n, t, c, h, w = CME_SHAPES[i]
    module = CME(c)
    state = {f"b.trans_att.{k}": v for k, v in parameters(f"cme{i}", cme_layout(c)).items()}
    module.load_state_dict({k.removeprefix("b.cme."): v for k, v in from_official(state).items()}, strict=False)
    module.train(mode == "train")
    x = draw(f"cmr.cme{i}.x", n * t, c, h, w, grad=True)
    seen = {}
    module.reduce[1].register_forward_hook(lambda m, a, y: seen.update(q=y.relu().chunk(2, 1)[0]))
    module.inflate[0].register_forward_hook(lambda m, a, y: seen.update(zhat=a[0]))
    module.inflate[1].register_forward_hook(lambda m, a, y: seen.update(pre_sigmoid=y.relu()))
    out = x * module(x, t).flatten(0, 1)[..., None, None]
    (out * draw(f"cmr.cme{i}.grad", *out.shape)).sum().backward()
    check(f"cme{i}/{mode}/out", out, 1e-5)
    for key, value in seen.items():
        check(f"cme{i}/{mode}/{key}", value, 1e-5)
    check_grads(f"cme{i}", mode, module, x)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("i", range(3))
def test_sme(i, mode):
    n, t, c, h, w = SME_SHAPES[i]
    module = SME(c)
    names = {"W.0.weight": (c, c, 1, 1), "W.0.bias": (c,)}
    names |= {f"W.1.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")}
    module.load_state_dict(parameters(f"sme{i}", names), strict=False)
    module.train(mode == "train")
    x = draw(f"cmr.sme{i}.x", n * t, c, h, w)
    if i == 2:
        x[1, :, 0, 0] = x[2, :, 0, 0] = x[0, :, 1, 1] = -1
    x.requires_grad_()
    features = x.relu()
    check(f"sme{i}/{mode}/masked", motion_map(features, t).flatten(0, 1)[:, None] * features, 1e-5)
    out = module(features, t)
    (out * draw(f"cmr.sme{i}.grad", *out.shape)).sum().backward()
    check(f"sme{i}/{mode}/out", out, 1e-5)
    check_grads(f"sme{i}", mode, module, x)


@pytest.mark.parametrize("start", ["init", "random"])
@pytest.mark.parametrize("i", range(2))
def test_tim(i, start):
    n, t, c, h, w = TIM_SHAPES[i]
    module = TIM(c)
    assert (module.weight[:, 0, :, 0].detach().numpy() == CASES[f"tim{i}/init"]).all()
    if start == "random":
        module.weight.data = torch.from_numpy(recipe.parameter(f"cmr.tim{i}.weight", (c, 1, 3, 1)))
    x = draw(f"cmr.tim{i}.x", n * t, c, h, w, grad=True)
    out = module(x, t)
    (out * draw(f"cmr.tim{i}.grad", *out.shape)).sum().backward()
    check(f"tim{i}/{start}/out", out, 1e-5)
    check(f"tim{i}/{start}/d_x", x.grad, 1e-5)
    check(f"tim{i}/{start}/d_weight", module.weight.grad, 2e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("i, shape, c_in, stride", [(0, (2, 4, 16, 7, 6), 16, 2), (1, (1, 8, 32, 5, 5), 32, 1)])
def test_block(i, shape, c_in, stride, mode):
    n, t, c, h, w = shape
    layout = json.loads((DATA / f"block{i}.layout.json").read_text())
    module = Bottleneck(c_in, 8, stride, ROWS["CMR"], first=i == 0)
    state = from_official({f"b.{k}": v for k, v in parameters(f"block{i}", layout).items()})
    module.load_state_dict({k.removeprefix("b."): v for k, v in state.items()})
    module.train(mode == "train")
    x = draw(f"cmr.block{i}.x", n * t, c, h, w).relu().requires_grad_()
    out = module(x, t)
    (out * draw(f"cmr.block{i}.grad", *out.shape)).sum().backward()
    check(f"block{i}/{mode}/out", out, 1e-5)
    check_grads(f"block{i}", mode, module, x)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_motion_excitation(mode):
    module = ME(32)
    module.load_state_dict({k: torch.from_numpy(recipe.parameter(f"cmr.me0.{k}", tuple(v.shape)))
                            for k, v in module.state_dict().items()})
    module.train(mode == "train")
    x = draw("cmr.me0.x", 16, 32, 5, 4, grad=True)
    out = module(x, 8)
    (out * draw("cmr.me0.grad", *out.shape)).sum().backward()
    check(f"me0/{mode}/out", out, 1e-5)
    check_grads("me0", mode, module, x)


def test_shift():
    check("shift0/out", shift(draw("cmr.shift0.x", 16, 20, 2, 3), 8), 0)


def network(classes: int, dtype):
    layout = json.loads((DATA / "layout.json").read_text())
    for name in ("new_fc.weight", "new_fc.bias"):
        layout[name] = [classes, *layout[name][1:]]
    state = recipe.state_dict(layout)
    for name in state:
        if name.endswith((".net.conv3.weight", ".spatial_att.W.0.weight")):
            state[name] = state[name] * np.float32(0.2)
        if name.endswith((".conv1_reduce_q.1.weight", ".conv1_reduce_q.1.bias")):
            state[name] = state[name] * np.float32(0.25)
    return load_official({f"module.{k}": v for k, v in state.items()}).to(dtype), list(layout)


NETS = [(174, 8, 1, 64), (5, 4, 2, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("i", range(2))
def test_network(i, dtype):
    classes, t, n, side = NETS[i]
    exact = dtype == torch.float64
    values, gradients = (5e-6, 5e-6) if exact else (1e-5, 2e-2)
    net, names = network(classes, dtype)
    x = draw(f"cmr.net{i}.x", n, 3 * t, side, side, grad=True, dtype=dtype)
    seen = {}

    def first_cme(module, inputs, gate):
        seen.setdefault("cme1_0", inputs[0] * gate.flatten(0, 1)[..., None, None])
    net.layer1[0].cme.register_forward_hook(first_cme)
    for k, y in enumerate(net.stages(x), 1):
        check(f"net{i}/layer{k}", y, values)
    check(f"net{i}/cme1_0", seen["cme1_0"], values)
    check(f"net{i}/pooled", y.mean((2, 3)), values)
    check(f"net{i}/frame_logits", net.frame_logits(x).flatten(0, 1), values)
    logits = net(x)
    check(f"net{i}/logits", logits, values)
    (logits * draw(f"cmr.net{i}.grad", *logits.shape, dtype=dtype)).sum().backward()
    check(f"net{i}/d_x", x.grad, gradients)
    prefix = f"net{i}/d_"
    stored = [k.removeprefix(prefix) for k in CASES if k.startswith(prefix) and not k.endswith(".stats")]
    ours = {k: p.grad for k, p in net.named_parameters()}
    for name in set(stored) - {"x"}:
        if "conv1_reduce" in name:
            joint = name.removeprefix("base_model.").replace(".net.", ".")
            joint = joint.replace("trans_att.conv1_reduce_q", "cme.reduce").replace(
                "trans_att.conv1_reduce_k", "cme.reduce")
            value = ours[joint].chunk(2)["_k." in name]
        else:
            value = ours[next(iter(from_official({name: torch.zeros(1)})))]
        check(prefix + name, value, gradients)
    net.train()
    net.dropout = 0.0
    check(f"net{i}/train_logits", net(x), values if exact else 1e-3)
    buffers = dict(net.named_buffers())
    prefix = f"net{i}/train_base_model."
    for name in [k.removeprefix(prefix) for k in CASES if k.startswith(prefix) and not k.endswith(".stats")]:
        ours = next(iter(from_official({name: torch.zeros(1)})))
        check(prefix + name, buffers[ours], values if exact else 1e-3)


@pytest.mark.parametrize("t", [8, 16])
def test_segment_sampling(t):
    for row, n in enumerate(CASES[f"sample/T{t}/lengths"]):
        n = int(n)
        assert (segment_indices(n, t) + 1 == CASES[f"sample/T{t}/centre"][row]).all()
        for seed in (0, 1):
            rng = np.random.RandomState(seed)
            assert (segment_indices(n, t, rng) + 1 == CASES[f"sample/T{t}/train_seed{seed}"][row]).all()
            rng = np.random.RandomState(seed)
            clips = np.concatenate([segment_indices(n, t),
                                    *((segment_indices(n, t, rng) if n >= t else np.zeros(t, int)) for _ in "ab")])
            assert (clips + 1 == CASES[f"sample/T{t}/clips3_seed{seed}"][row]).all()


@pytest.mark.parametrize("rate", [8, 4])
def test_dense_sampling(rate):
    for row, n in enumerate(CASES[f"dense/T8_r{rate}/lengths"]):
        n = int(n)
        assert (dense_indices(n, 8, rate)[0] + 1 == CASES[f"dense/T8_r{rate}/one"][row]).all()
        assert (dense_indices(n, 8, rate, clips=10).ravel() + 1 == CASES[f"dense/T8_r{rate}/ten"][row]).all()
        for seed in (0, 1):
            got = dense_indices(n, 8, rate, rng=np.random.RandomState(seed))[0]
            assert (got + 1 == CASES[f"dense/T8_r{rate}/train_seed{seed}"][row]).all()


def test_multi_scale_crops():
    import random

    assert sorted(map(tuple, crop_offsets(340, 256, 224))) == sorted(map(tuple, CASES["crop/all"].tolist()))
    from facebook_nb.readers.video import draw_crop
    for seed, want in enumerate(CASES["crop/sampled"].tolist()):
        assert list(draw_crop(340, 256, 224, random.Random(seed))) == want
