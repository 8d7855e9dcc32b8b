"""DaST, the predecessor, beside its released code: networks, losses and one whole iteration."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facebook_nb import substitute as sub
from tests.parity import recipe

HERE = Path(__file__).parent / "data" / "substitute"
P = "substitute.dev"


@pytest.fixture(scope="module")
def cases():
    with np.load(HERE / "cases.npz") as file:
        return {k: file[k] for k in file.files}


def official(network, prefix):
    """A network filled by the recipe, loaded the way a released checkpoint is."""
    layout = json.loads((HERE / f"dast_{network}.layout.json").read_text())
    state = {"module." + k: recipe.parameter(prefix + k, tuple(v)) for k, v in layout.items()}
    return sub.load_official(state)


def generator():
    return [official("branch", f"dast.branch{k}.") for k in range(10)], official("generator", "dast.generator.")


def normal(name, shape):
    return torch.from_numpy(recipe.normal(f"{P}.{name}", shape))


def check(cases, key, found, rtol=0.0, atol=0.0, of_max=0.0):
    """Against a whole array, or against the slice and statistics of a large one."""
    found = found.detach().double().numpy()
    if key in cases:
        want = cases[key]
    else:
        mean, std, stride = cases[f"{key}/stats"]
        assert found.shape == tuple(cases[f"{key}/shape"])
        scale = max(of_max * np.abs(found).max(), atol, 1e-4 * std)
        np.testing.assert_allclose([found.mean(), found.std()], [mean, std], atol=scale, rtol=1e-3)
        want = cases[f"{key}/slice"]
        found = found.reshape(-1)[:: int(stride)][: len(want)]
    np.testing.assert_allclose(found, want, rtol=rtol, atol=max(atol, of_max * np.abs(want).max()))


@pytest.mark.parametrize("kind", ["s", "m", "l"])
def test_networks(cases, kind):
    x = torch.from_numpy(recipe.uniform(f"{P}.x", (3, 1, 28, 28)))
    with torch.no_grad():
        check(cases, f"net/Net_{kind}", official(f"net_{kind}", f"dast.Net_{kind}.")(x), atol=1e-4)


def test_imitation_and_its_gradient(cases):
    logits = normal("logits", (7, 10)).requires_grad_()
    p = normal("target_logits", (7, 10)).softmax(1)
    value = (-sub.imitation(logits, p.argmax(1), p, beta=0.1).mean()).exp()
    check(cases, "imitate", value, rtol=1e-5)
    grad, = torch.autograd.grad(value, logits)
    # some entries are differences of nearly equal numbers: float32 leaves them 1e-8 of absolute error
    check(cases, "imitate_grad", grad, rtol=1e-5, atol=1e-9)


def test_generator_in_eval(cases):
    branches, trunk = generator()
    z = normal("z", (4, 128, 1, 1))
    with torch.no_grad():
        features = branches[3](z)
        check(cases, "eval/branch3", features, atol=1e-5)
        check(cases, "eval/image", trunk(features), atol=1e-5)
        all_of_them = sub.dast_images(branches, trunk, z.repeat(10, 1, 1, 1))
        torch.testing.assert_close(all_of_them[12:16], trunk(features), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["literal", "fast"])
def test_a_whole_iteration(cases, form):
    branches, trunk = generator()
    student, target = official("net_l", "dast.Net_l."), official("net_m", "dast.Net_m.")
    for m in (*branches, trunk, student):
        m.train()
    noise = normal("noise", (40, 128, 1, 1))
    if form == "fast":
        images = sub.dast_images(branches, trunk, noise)
    else:
        images = torch.cat([trunk(branch(z)) for branch, z in zip(branches, noise.chunk(10))])
    order = torch.from_numpy(np.argsort(recipe.uniform(f"{P}.perm", (40,)), kind="stable"))
    images, set_label = images[order], torch.arange(10).repeat_interleave(4)[order]
    assert (set_label.numpy() == cases["step/set_label"]).all()
    check(cases, "step/images", images, rtol=1e-4, atol=1e-5)

    door = sub.Door(target, 10, 40)
    y, p = door(images)
    assert door.spent == 40 and (y.numpy() == cases["step/target_label"]).all()
    check(cases, "step/target_prob", p, rtol=1e-4, atol=1e-6)
    logits = student(images.detach())
    loss = sub.imitation(logits, y, p, beta=0.1).mean()
    check(cases, "step/errD", loss, rtol=1e-4)
    check(cases, "step/errD_prob", (logits.softmax(1) - p).square().mean(), rtol=1e-4)
    names, parameters = zip(*student.named_parameters())
    grads = torch.autograd.grad(loss, parameters)
    for name, w, g in zip(names, parameters, grads):
        check(cases, f"step/substitute_grad/{name}", g, of_max=1e-2)
        w.data.sub_(1e-3 * g)

    logits = student(images)
    weights = sub.Weights(control=0.2, noise=0, diverse=0)
    parts = sub.generator_loss(
        logits, sub.imitation(logits, y, p, beta=0.1), set_label, images, noise, None, 10, weights
    )
    check(cases, "step/loss_imitate", parts["adv"], rtol=1e-4)
    check(cases, "step/loss_diversity", F.cross_entropy(logits, set_label), rtol=1e-4)
    check(cases, "step/errG", parts["loss"], rtol=1e-4)
    parts["loss"].backward()
    for key, m in (("generator", trunk), ("branch0", branches[0]), ("branch9", branches[9])):
        for name, w in m.named_parameters():
            check(cases, f"step/{key}_grad/{name}", w.grad, of_max=1e-2)
    for name, value in trunk.named_buffers():
        if "running" in name:
            check(cases, f"step/generator_buffer/{name}", value, rtol=1e-4, atol=1e-5)
    assert trunk.main[1].num_batches_tracked == 10


def test_the_released_vgg_loads():
    """Names and shapes as the release builds them: convolution, normalisation, ReLU; halvings; three linear."""
    plan = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]
    layout, k, channels = {}, 0, 3
    for width in plan:
        if width:
            layout[f"features.{k}.weight"], layout[f"features.{k}.bias"] = (width, channels, 3, 3), (width,)
            for name in ("weight", "bias", "running_mean", "running_var"):
                layout[f"features.{k + 1}.{name}"] = (width,)
            channels, k = width, k + 2
        k += 1
    for k, (rows, columns) in {1: (512, 512), 4: (512, 512), 6: (10, 512)}.items():
        layout[f"classifier.{k}.weight"], layout[f"classifier.{k}.bias"] = (rows, columns), (rows,)
    state = {"module." + k: recipe.parameter("vgg." + k, v) for k, v in layout.items()}
    model = sub.load_official({"model": state})
    assert isinstance(model, sub.Vgg) and not model.training
    with torch.no_grad():
        x = torch.rand(2, 3, 32, 32)
        flat = model.classifier(model.features(x).flatten(1))       # the release flattens the last 1×1
        torch.testing.assert_close(model(x), flat)
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 10)
    del state["module.features.40.weight"]
    with pytest.raises(ValueError, match="features.40.weight"):
        sub.load_official(state, "vgg16")


def test_a_wrong_checkpoint_is_told():
    layout = json.loads((HERE / "dast_net_m.layout.json").read_text())
    state = recipe.state_dict(layout)
    del state["conv3.bias"]
    with pytest.raises(ValueError, match="conv3.bias"):
        sub.load_official(state, "net_m")
    with pytest.raises(ValueError, match="net_s"):
        sub.load_official(state, "net_xl")
