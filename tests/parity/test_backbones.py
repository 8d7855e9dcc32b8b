"""The backbones give their authors' numbers: outputs, input gradients, a training step; and load by their names."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facebook_nb.files import UserError, load_strict
from facebook_nb.models.backbones import InceptionResNetV1, IRNet, MobileFaceNet, SmallResNet, load_trunk
from tests.parity import recipe

DATA = Path(__file__).parent / "data"


def cases(slug):
    return np.load(DATA / slug / "backbones.npz")


def filled(data, name, scale):
    """The recipe's state dict for a layout, tensors of two or more dimensions times `scale`."""
    layout = json.loads(data[f"layout/{name}"].tobytes())
    state = recipe.state_dict(layout)
    return {k: torch.from_numpy(v * np.float32(scale) if v.ndim >= 2 else v) for k, v in state.items()}


def image(name, side):
    return torch.from_numpy(recipe.uniform(name, (2, 3, side, side), -1, 1)).requires_grad_()


def loaded(build, state):
    """The network with these weights, in eval mode; drawing its own first would take longer than running it."""
    with torch.device("meta"):
        net = build()
    return load_strict(net.to_empty(device="cpu"), state).eval()


def close(mine, theirs, share, of=None):
    """Within `share` of the largest value of the whole tensor."""
    theirs = torch.as_tensor(theirs)
    largest = float(theirs.abs().max() if of is None else of)
    torch.testing.assert_close(torch.as_tensor(mine), theirs, rtol=0, atol=share * largest)


def close_slice(mine, data, key, share):
    """The same for an array that the case stores in part."""
    if key in data:
        return close(mine, data[key], share)
    stats = data[f"{key}/stats"]
    assert tuple(mine.shape) == tuple(data[f"{key}/shape"])
    close(mine.flatten()[::int(stats[3])], data[f"{key}/slice"], share, of=stats[2])


SDD = {"r50_quality": lambda: IRNet(50, "tface_quality", "quality"),
       "r50_recogniser": lambda: IRNet(50, "tface_quality"),
       "mfn_quality": lambda: MobileFaceNet("quality"),
       "mfn_recogniser": lambda: MobileFaceNet()}


@pytest.mark.parametrize("name", SDD)
def test_sdd_fiqa(name):
    data = cases("sdd_fiqa")
    net = loaded(SDD[name], filled(data, name, 0.5))
    x = image(f"sdd.dev.{name}.image", 112)
    f = net.features(x)
    assert f.shape == (2, 512, 7, 7)
    out = net.embed(f)
    torch.testing.assert_close(out.detach(), torch.from_numpy(data[f"{name}/out"]), rtol=1e-4,
                               atol=1e-4 * float(np.abs(data[f"{name}/out"]).max()))
    up = torch.from_numpy(recipe.normal(f"sdd.dev.{name}.up", (2, 512))) if "recogniser" in name else None
    (out.sum() if up is None else (F.normalize(out) * up).sum()).backward()
    close_slice(x.grad, data, f"{name}/d_image", 1e-3)


def test_sdd_fiqa_in_training_mode():
    data = cases("sdd_fiqa")
    net = loaded(SDD["mfn_quality"], filled(data, "mfn_quality", 0.5)).train()
    net.quality[2].p = 0.0
    pred = net(image("sdd.dev.mfn_quality.image", 112)).squeeze(-1)
    loss = F.smooth_l1_loss(pred, torch.from_numpy(recipe.uniform("sdd.dev.mfn_quality.label", (2,), 0, 100)))
    loss.backward()
    close(pred.detach(), data["mfn_quality/train/pred"], 1e-3)
    close(loss.detach(), data["mfn_quality/train/loss"], 1e-3)
    values = net.state_dict() | {f"grad/{k}": p.grad for k, p in net.named_parameters()}
    names = {k.split("/train/")[1] for k in data if "/train/" in k}
    names = {n.removesuffix("/shape").removesuffix("/stats").removesuffix("/slice") for n in names} - {"pred", "loss"}
    assert len(names) == 9
    for name in names:
        close_slice(values[name], data, f"mfn_quality/train/{name}", 1e-3)


def test_fpr():
    data = cases("fpr")
    net = loaded(lambda: IRNet(34), filled(data, "ir34", 0.5))
    x = image("fpr.dev.ir34.image", 112)
    out = net(x)
    (F.normalize(out) * torch.from_numpy(recipe.normal("fpr.dev.ir34.up", (2, 512)))).sum().backward()
    theirs = torch.from_numpy(data["ir34/embedding"])
    torch.testing.assert_close(out.detach(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    close_slice(x.grad, data, "ir34/d_image", 1e-3)


ADV = {"ir152": (lambda: IRNet(152, "insightface"), 0.35, 112, 1e-3),
       "irse50": (lambda: IRNet(50, "insightface_se"), 0.35, 112, 1e-3),
       "mobile_face": (lambda: MobileFaceNet("insightface"), 1.0, 112, 1e-3),
       "facenet": (InceptionResNetV1, 1.0, 160, 2e-2)}


@pytest.mark.parametrize("name", ADV)
def test_adv_makeup(name):
    build, scale, side, share = ADV[name]
    data = cases("adv_makeup")
    net = loaded(build, filled(data, name, scale))
    x = image(f"adv_makeup.dev.face.{name}", side)
    first, second = out = net(x)
    theirs = torch.from_numpy(data[f"{name}/embedding"])
    torch.testing.assert_close(out.detach(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    cosine = F.cosine_similarity(first, second.detach(), 0)     # the case holds the second embedding fixed
    assert abs(cosine.item() - data[f"{name}/cos"]) < 1e-5
    (1 - cosine).backward()
    close(x.grad.flatten()[::997], data[f"{name}/grad_slice"], share)
    mean, std = data[f"{name}/grad_stats"]
    assert abs(x.grad.std().item() / std - 1) < share and abs(x.grad.mean().item() - mean) < share * std
    lengths = out.detach().norm(dim=1)
    assert (abs(lengths - 1).max() < 1e-5) == (name != "ir152")


def names(net):
    return {k: list(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("slug, name, build", [
    ("fpr", "ir50", lambda: IRNet(50)), ("fpr", "ir34", lambda: IRNet(34)),
    *(("sdd_fiqa", k, v) for k, v in SDD.items()), *(("adv_makeup", k, v[0]) for k, v in ADV.items())])
def test_names_are_the_layouts(slug, name, build):
    with torch.device("meta"):
        net = build()
    assert names(net) == json.loads(cases(slug)[f"layout/{name}"].tobytes())


def test_depths_have_their_convolutions():
    for depth, blocks in {18: 8, 34: 16, 50: 24, 100: 49, 152: 50}.items():
        with torch.device("meta"):
            net = IRNet(depth).eval()
            assert net(torch.empty(1, 3, 112, 112)).shape == (1, 512) and len(net.body) == blocks


def test_initial_weights_follow_the_released_code():
    torch.manual_seed(0)
    net = SmallResNet(head="quality")
    conv, bn, prelu = net.body[3].res_layer[4], net.body[3].res_layer[0], net.body[3].res_layer[3]
    assert abs(conv.weight.std().item() / (2 / (128 * 9)) ** 0.5 - 1) < 0.02          # fan-out, gain √2
    assert (bn.weight == 1).all() and (bn.bias == 0).all() and (prelu.weight == 0.25).all()
    assert net.quality[3].bias.item() == 0 and net.quality[1].weight.shape == (8 * 16 * 4 * 4,)


@pytest.mark.parametrize("build, word", [(lambda: IRNet(51), "depth"), (lambda: IRNet(50, "torchvision"), "variant"),
                                         (lambda: IRNet(18, head="mean"), "head"),
                                         (lambda: MobileFaceNet("mean"), "head"),
                                         (lambda: SmallResNet(head="mean"), "head")])
def test_unknown_choices_are_named(build, word):
    with torch.device("meta"), pytest.raises(UserError, match=word):
        build()


def test_a_quality_network_starts_from_a_recogniser(tmp_path):
    teacher, judge = MobileFaceNet(), MobileFaceNet("quality")
    head = judge.quality[3].weight.clone()
    torch.save({f"module.{k}": v for k, v in teacher.state_dict().items()}, tmp_path / "teacher.pth")
    load_trunk(judge, tmp_path / "teacher.pth")
    x = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(judge.eval().features(x), teacher.eval().features(x))
    assert torch.equal(judge.quality[3].weight, head)
    short = {k: v for k, v in teacher.state_dict().items() if k != "conv_3.model.2.conv.bn.weight"}
    with pytest.raises(UserError, match="conv_3.model.2.conv.bn.weight"):
        load_trunk(judge, short)


def test_the_small_one_learns_eight_pictures():
    torch.manual_seed(1)
    net = SmallResNet(dim=16, width=8, size=32)
    x, y = torch.rand(16, 3, 32, 32).mul(2).sub(1), torch.arange(8).repeat(2)
    x[8:] = x[:8] + 0.1 * torch.randn(8, 3, 32, 32)
    centres = torch.nn.Parameter(torch.randn(8, 16))
    optimiser = torch.optim.Adam([*net.parameters(), centres], 3e-3)
    for _ in range(25):
        loss = F.cross_entropy(8 * F.normalize(net(x)) @ F.normalize(centres).T, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3                                           # it starts above log 8
    assert net.features(x).shape == (16, 64, 2, 2)


def test_the_small_one_runs_on(device):
    net = SmallResNet(head="quality").to(device).eval()
    assert net(torch.zeros(3, 3, 64, 64, device=device)).shape == (3, 1)
