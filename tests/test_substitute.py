"""The substitute chapter: the door, the losses, the attacks, the loop, the readers and the audit."""
import gzip
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from facebook_nb import substitute as sub
from facebook_nb.experiment import generator
from facebook_nb.files import UserError, read_json, read_weights
from tests.conftest import data_folder

SMALL = dict(budget=60, batch=20, checkpoints=(20, 60), width=4, replay=1, test_images=20, target_steps=5)


def bright(x):
    """A target with two classes: is the image bright?"""
    p = 1 / (1 + np.exp(-20 * (x.reshape(len(x), -1).mean(1) - 0.5)))
    return np.stack([1 - p, p], 1)


def test_the_door_counts_and_closes():
    shown = []
    door = sub.Door(lambda x: shown.append(len(x)) or bright(x), 2, 10)
    y, p = door(torch.ones(7, 1, 4, 4))
    assert (y == 1).all() and p.shape == (7, 2) and door.spent == 7 and door.remaining == 3
    with pytest.raises(UserError, match="4 images, but 3 of a budget of 10"):
        door(torch.ones(4, 1, 4, 4))
    assert shown == [7] and door.spent == 7
    door.judge(torch.ones(5, 1, 4, 4))
    assert (door.spent, door.judged) == (7, 5)
    for name in ("spent", "budget", "remaining"):
        with pytest.raises(AttributeError):
            setattr(door, name, 0)


def test_a_failing_target_has_been_asked():
    door = sub.Door(lambda x: 1 / 0, 2, 10)
    with pytest.raises(ZeroDivisionError):
        door(torch.ones(4, 1, 4, 4))
    assert door.spent == 4


def test_label_access_gives_labels_only():
    assert sub.Door(bright, 2, 10, "labels")(torch.ones(2, 1, 4, 4))[1] is None
    p = sub.Door(bright, 2, 10, "rounded")(torch.full((2, 1, 4, 4), 0.47))[1]
    assert (p * 100 - (p * 100).round()).abs().max() < 1e-4 and 0.3 < p[0, 1] < 0.4
    with pytest.raises(UserError, match="probabilities, rounded, labels"):
        sub.Door(bright, 2, 10, "everything")
    door = sub.Door(lambda x: np.zeros(len(x), np.int64), 2, 10)
    assert door(torch.ones(2, 1, 4, 4))[1] is None and door.access == "labels"


@pytest.mark.parametrize("answer, what", [
    (lambda x: np.zeros((len(x), 3)), r"shape \(2, 3\)"),
    (lambda x: np.full((len(x), 2), np.nan), "finite"),
    (lambda x: np.full(len(x), 2), "label outside 0…1"),
    (lambda x: np.tile([-3.0, 4.0], (len(x), 1)), "no probabilities; take the softmax"),
    (lambda x: np.full((len(x), 2), 0.75), "sums up to 1.5"),
    (lambda x: [["a", "b"]] * len(x), "finite probabilities"),
])
def test_a_nonsensical_answer_is_told(answer, what):
    with pytest.raises(UserError, match=what):
        sub.Door(answer, 2, 10)(torch.ones(2, 1, 4, 4))


def test_targets_of_all_kinds():
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC

    x = np.random.default_rng(0).random((40, 1, 4, 4), np.float32)
    y = (x.reshape(40, -1).mean(1) > 0.5) * 2           # class 1 does not occur
    p = sub.classifier(KNeighborsClassifier().fit(x.reshape(40, -1), y))(x)
    assert p.shape == (40, 3) and (p[:, 1] == 0).all()
    assert set(sub.classifier(LinearSVC().fit(x.reshape(40, -1), y))(x)) <= {0, 2}
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    door = sub.Door(module, 3, 40)
    asked = torch.from_numpy(x).requires_grad_()
    p = door(asked)[1]
    assert not p.requires_grad and module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    with pytest.raises(UserError, match="cannot be called"):
        sub.classifier("https://example.org/predict")
    for names in (np.array([-1, 1]), np.array(["a", "b"])):
        told = KNeighborsClassifier().fit(x.reshape(40, -1), names[y // 2])
        with pytest.raises(UserError, match="integers from 0"):
            sub.classifier(told)


def test_imitation_in_its_three_forms():
    z = torch.randn(5, 4, generator=generator(0)).requires_grad_()
    p = torch.rand(5, 4, generator=generator(1))
    p, y = p / p.sum(1, keepdim=True), p.argmax(1)
    grad, = torch.autograd.grad(sub.imitation(z, y, p).sum(), z)
    torch.testing.assert_close(grad, z.detach().softmax(1) - p)     # soft cross-entropy is least where S = T
    torch.testing.assert_close(sub.imitation(z, y), F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(sub.imitation(z, y, p, 0.0), sub.imitation(z, y))
    assert (sub.imitation(z, y, p, 2.0) > sub.imitation(z, y)).all()


@pytest.mark.parametrize("condition", ["norm", "concat", "branches"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 5, 4), (3, 30, 41)])
def test_generator_shapes(condition, shape):
    g = sub.Generator(shape, 3, 4, 5, condition)
    x = g(torch.randn(6, 5), torch.arange(3).repeat_interleave(2))
    assert x.shape == (6, *shape) and 0 <= x.min() < 0.4 < 0.6 < x.max() <= 1
    assert sub.Reader(shape, 5, 4)(x).shape == (6, 5)


def test_conditional_normalisation_begins_as_plain_and_learns_classes():
    norm = sub.CondNorm(3, 4)
    f, h = torch.randn(8, 3, 5, 5), torch.randn(8, 4)
    torch.testing.assert_close(norm(f, h), F.batch_norm(f, None, None, training=True))
    nn.init.normal_(norm.heads.weight)
    assert (norm(f, h) - norm(f, h.flip(0))).abs().max() > 0.1


def test_diversity_by_hand():
    x = torch.tensor([0.0, 0.2, 0.5, 0.9]).view(4, 1, 1, 1)
    z = torch.tensor([[0.0], [1.0], [3.0], [5.0]])
    want = ((0.2 / 1) + (0.4 / 2)) / 2                  # pairs (0, 1) and (2, 3), each twice
    assert abs(sub.diversity(x, z, 2).item() - 1 / (want + 1e-5)) < 1e-4
    with pytest.raises(ValueError, match="two images"):
        sub.diversity(x, z, 4)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("targeted", [False, True])
def test_sign_attacks_stay_in_their_ball_and_work(norm, eps, targeted):
    s, x = linear(), torch.rand(20, 1, 4, 4)
    y = s(x).argmax(1)
    goal = (y + 1) % 3 if targeted else y
    adv = sub.sign_attack(s, x, goal, eps, eps / 3, 6, targeted, generator(0), norm)
    far = (adv - x).flatten(1).norm(dim=1) if norm == "l2" else (adv - x).abs().amax((1, 2, 3))
    assert (far <= eps + 1e-6).all() and 0 <= adv.min() and adv.max() <= 1
    gain = F.cross_entropy(s(adv), goal) - F.cross_entropy(s(x), goal)
    assert (gain < 0) == targeted
    assert all(w.grad is None for w in s.parameters())


def test_an_attack_leaves_its_model_and_refuses_what_is_no_radius():
    s = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)).train()
    s[1].eval()                                         # frozen by its owner
    before = {k: v.clone() for k, v in s.state_dict().items()}
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    for attack in (lambda: sub.sign_attack(s, x, y, 0.1, 0.1, 2), lambda: sub.augment(s, x, y),
                   lambda: sub.carlini_wagner(s, x, y, rounds=1, steps=2),
                   lambda: sub.universal(s, x, 0.1, "cosine", generator(0), 2)):
        attack()
        assert s.training and s[0].training and not s[1].training
        assert all(torch.equal(v, before[k]) for k, v in s.state_dict().items())
    for eps, norm in ((8, "linf"), (-0.1, "linf"), (5, "l2")):
        with pytest.raises(UserError, match="8/255"):
            sub.sign_attack(s, x, y, eps, eps, 1, norm=norm)


def test_fgsm_is_one_signed_step():
    s, x = linear(), torch.full((2, 1, 4, 4), 0.5)
    y = torch.tensor([0, 2])
    w = s[1].weight
    p = s(x).softmax(1)
    slope = (p @ w - w[y]).view_as(x).sign()
    torch.testing.assert_close(sub.sign_attack(s, x, y, 0.1, 0.1, 1), x + 0.1 * slope)


def test_carlini_wagner_finds_a_short_way_across():
    s = linear(1)
    x = torch.rand(10, 1, 4, 4) * 0.4 + 0.3
    z = s(x)
    y = z.argmax(1)
    adv = sub.carlini_wagner(s, x, y, rounds=6, steps=60, rate=0.05)
    moved = s(adv).argmax(1) != y
    assert moved.all()
    w = s[1].weight
    least = torch.stack([(z[k, y[k]] - z[k]).div((w[y[k]] - w).norm(dim=1).clamp(min=1e-9)).masked_fill(
        torch.arange(3) == y[k], np.inf).min() for k in range(10)])
    assert ((adv - x).flatten(1).norm(dim=1) < 1.5 * least + 0.02).all()    # a plane's distance is known


def test_boundary_images_leave_the_student_as_it_was():
    s = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).train()
    before = {k: v.clone() for k, v in s.state_dict().items()}
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    near = sub.boundary_images(s, x, y, 0.2, 3, generator(0))
    assert s.training and all(torch.equal(v, before[k]) for k, v in s.state_dict().items())
    assert 0 < (near - x).abs().max() <= 0.2 + 1e-6
    control = sub.boundary_images(s, x, y, 0.2, 3, generator(0), "random")
    assert abs((control - x).abs().max() - (near - x).abs().max()) < 1e-6      # the radius is the same draw


def test_success_by_hand():
    door = sub.Door(bright, 2, 0)
    light, dark = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    y, answered = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 0, 1])    # the last is wrong from the start
    adv = torch.cat([dark, light, light, dark])
    assert abs(sub.fooled(door, adv, y, answered) - 2 / 3) < 1e-6
    goal = torch.tensor([0, 0, 1, 0])
    assert abs(sub.fooled(door, adv, y, answered, goal) - 3 / 4) < 1e-6
    assert np.isnan(sub.fooled(door, adv, 1 - answered, answered)) and door.spent == 0


def test_carlini_wagner_reaches_a_goal():
    s, x = linear(1), torch.rand(10, 1, 4, 4) * 0.4 + 0.3
    goal = (s(x).argmax(1) + 1) % 3
    adv = sub.carlini_wagner(s, x, goal, True, rounds=6, steps=60, rate=0.05)
    assert (s(adv).argmax(1) == goal).all() and 0 <= adv.min() and adv.max() <= 1


@pytest.mark.parametrize("kind", ["activations", "cosine"])
def test_one_perturbation_for_all(kind):
    torch.manual_seed(0)
    s, x = sub.network("small", (1, 8, 8), 3).eval(), torch.rand(20, 1, 8, 8)
    start = sub.universal(s, x, 0.2, kind, generator(0), 0)
    found = sub.universal(s, x, 0.2, kind, generator(0))
    assert found.shape == (1, 8, 8) and found.abs().max() <= 0.2 + 1e-6
    if kind == "activations":
        score = lambda d: s[:3](d[None]).norm().log() + s[:6](d[None]).norm().log()
    else:
        score = lambda d: -F.cosine_similarity(s((x + d).clamp(0, 1)), s(x)).mean()
    assert score(found) > score(start)
    assert not any(m._forward_hooks for m in s.modules()) and all(w.grad is None for w in s.parameters())


def level(at):
    """Class 0 where the mean of 4×4 pixels is above `at`, else class 1."""
    s = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    s[1].weight.data = torch.tensor([[1.0], [-1.0]]).expand(2, 16).clone()
    s[1].bias.data = torch.tensor([0.0, 32 * at])
    return s


def test_the_mechanism_of_boundary_queries_by_hand():
    x = torch.full((3, 1, 4, 4), 0.5)
    for far, gap in ((0.44, 0.0), (0.39, 0.5), (0.2, 1.375)):    # 0.1 · 2 is as far as it looks
        assert abs(sub.boundary_gap(level(0.44), sub.Door(level(far), 2, 0), x, 0.1) - gap) < 1e-6
    assert np.isnan(sub.boundary_gap(level(0.44), sub.Door(level(0.6), 2, 0), x, 0.1))
    s, door = level(0.44), sub.Door(level(0.39), 2, 0)
    y = door.judge(x).argmax(1)
    at, random, near = sub.disagreement(s, door, x, y, 0.11, 5, generator(0))
    assert at == random == 0 and near in (0, 1) and door.spent == 0
    assert abs(sub.evenness([5, 5, 5]) - 1) < 1e-9 and sub.evenness([9, 0, 0]) == 0
    assert abs(sub.within(torch.tensor([0.0, 0.2, 0.5, 0.5]).view(4, 1, 1, 1), 2) - 0.1) < 1e-6


def test_the_radius_is_where_the_target_itself_falls():
    x = torch.linspace(0.5, 0.6, 11).view(11, 1, 1, 1).expand(11, 1, 4, 4)
    found = sub.white_box_radius(level(0.45), x, torch.zeros(11).long(), 2, 0.9, 10, 0)
    assert 0.14 - 1 / 255 < found < 0.15 + 1 / 255          # ten of eleven lie less than 0.15 away


def test_training_on_attacks_hardens_a_target():
    config = sub.Config.preset("smoke", target_steps=150, test_images=300)
    data = sub.split(sub.read_data("digits", None), config, 0)
    x, y = data["test"]
    left = {}
    for name in ("cnn", "hardened"):
        target = sub.make_target(name, *data["target"], 10, config, 0)
        adv = sub.sign_attack(target, x, y, 0.2, 0.05, 8)
        left[name] = (target(adv).argmax(1) == y).float().mean()
    assert left["hardened"] > left["cnn"] + 0.1


def test_the_support_vector_machine_is_scikit_learns():
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    x = np.random.default_rng(0).random((90, 12)).astype(np.float32)
    y = (x[:, :4] + x[:, 4:8]).argmax(1)
    model = CalibratedClassifierCV(SVC(C=10), ensemble=False, cv=3).fit(x, y)
    net = sub.SvcNet(sub.svc_state(model))
    again = sub.SvcNet(net.state_dict())
    fresh = np.random.default_rng(1).random((50, 12)).astype(np.float32)
    p = sub.classifier(net)(fresh)
    np.testing.assert_allclose(p, model.predict_proba(fresh), atol=2e-5)
    assert (sub.classifier(again)(fresh) == p).all()
    asked = torch.from_numpy(fresh).requires_grad_()
    assert torch.autograd.grad(net(asked)[:, 0].sum(), asked)[0].abs().min(1).values.max() > 0


def test_enlarging_in_one_step_is_the_two_steps():
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    outs = [sub.enlarged(x, conv), conv(F.interpolate(x, scale_factor=2))]
    torch.testing.assert_close(*outs)
    pull = torch.randn_like(outs[0])
    for a, b in zip(*(torch.autograd.grad((y * pull).sum(), [x, *conv.parameters()]) for y in outs)):
        torch.testing.assert_close(a, b)


def test_one_backward_pass_augments_as_many_did():
    s, x, y = linear(), torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    one_by_one = []
    for image, label in zip(x, y):
        image = image[None].requires_grad_()
        grad, = torch.autograd.grad(s(image)[0, label], image)
        one_by_one.append((image + 0.1 * grad.sign()).clamp(0, 1).detach())
    torch.testing.assert_close(sub.augment(s, x, y), torch.cat(one_by_one))


def test_probing_finds_the_true_slope():
    target, student = linear(3), linear(4)
    z = torch.randn(4, 1, 4, 4).double()
    target, student = target.double(), student.double()
    door = sub.Door(lambda x: target(torch.from_numpy(x).double()).softmax(1).detach().numpy(), 3, 10**6)
    p = door(z.sigmoid())[1].double()
    v = z.clone().requires_grad_()
    log = target(v.sigmoid()).log_softmax(1)
    true, = torch.autograd.grad(
        -(student(v.sigmoid()) - (log - log.mean(1, keepdim=True))).abs().sum() / 4, v)
    before = door.spent
    with torch.no_grad():
        found = sub.probe(door, z, z.sigmoid(), p, student, "dfme", 600, generator(0), 1e-2)
    assert door.spent == before + 4 * 600
    assert F.cosine_similarity(found.flatten(), true.flatten(), dim=0) > 0.9


def test_store_keeps_a_fair_sample():
    store, draw = sub.Store((1, 1, 1), 2, 50), generator(0)
    for k in range(40):
        y = torch.arange(k * 25, k * 25 + 25)
        store.add(y.view(-1, 1, 1, 1) / 1000, y, None, draw)
    assert store.size == 50 and store.seen == 1000 and store.y.unique().numel() == 50
    assert 350 < store.y.float().mean() < 650
    x, y, p = store.draw(20, draw)
    assert p is None and (x.flatten() - y / 1000).abs().max() < 1e-3


def test_strokes_have_ink_and_paper():
    x = sub.strokes(50, (3, 12, 12), generator(0))
    assert x.shape == (50, 3, 12, 12) and torch.equal(x[:, 0], x[:, 2])
    assert 0 <= x.min() and x.max() <= 1 and (x.amax((1, 2, 3)) > 0.5).all() and (x.mean((1, 2, 3)) < 0.7).all()


def test_statistics_stand_still():
    norm = nn.BatchNorm2d(2).train()
    with sub.still_statistics(norm):
        norm(torch.randn(4, 2, 3, 3) + 5)
    assert (norm.running_mean == 0).all() and norm.momentum == 0.1


@pytest.mark.parametrize("row", list(sub.ROWS))
def test_every_row_keeps_to_its_budget(row, device):
    config = sub.Config.preset("book", **SMALL)
    asked = []
    door = sub.Door(lambda x: asked.append(len(x)) or bright(x), 2, 50, sub.ROWS[row].access)
    seen = []
    images = torch.rand(30, 1, 8, 8)
    student, store, _ = sub.steal(
        sub.ROWS[row], door, (1, 8, 8), config, 0, images, None, lambda q, *_: seen.append(q))
    assert sum(asked) == door.spent <= 50 and len(seen) == 1 and 20 <= seen[0] <= 50
    assert door.spent == (30 if row == "real images" else 50)
    assert not student.training and store.seen <= door.spent


def test_a_run_repeats_resumes_and_reports(tmp_path):
    over = dict(SMALL, rows=(
        "DaST-like", "DDG, no diversity", "DDG", "DDG + AST", "DDG + random ε", "real images"), n_seeds=2)
    one = sub.run(sub.Config.preset("smoke", out_dir=tmp_path / "a", **over))
    (tmp_path / "a" / "metrics.json").unlink()
    next((tmp_path / "a" / "steps").rglob("*AST.npz")).unlink()
    again = sub.run(sub.Config.preset("smoke", out_dir=tmp_path / "a", **over))
    assert one.metrics == again.metrics or np.testing.assert_equal(one.metrics, again.metrics) is None
    told = read_json(tmp_path / "a" / "metrics.json")
    assert told["metrics"]["DDG + AST"]["queries"]["mean"] == 60
    assert {"random ± ε", "white box", "targets"} < set(told["metrics"])
    assert told["roles"]["DaST-like"] == "baseline" and len(told["findings"]) == 4 and len(told["mechanism"]) == 4
    assert told["claim"]["smallest_effect"] == 1 and told["claim"]["verdict"] in ("shown", "refuted", "undecided")
    assert one.arrays["images DDG"].shape == (10, 2, 1, 8, 8)
    assert one.arrays["curve real images"].shape == (2, 2, 2, 3)
    assert set(read_weights(tmp_path / "a" / "weights.safetensors")) == set(
        sub.network("strided", (1, 8, 8), 10).state_dict())


@pytest.mark.parametrize("over, what", [
    (dict(rows=("DGD",)), "no row 'DGD'"), (dict(devices=2), "devices=1"), (dict(data="cifar10"), "cifar-10-batches"),
    (dict(rows=("DDG", "JBDA")), "DaST-like and DDG"), (dict(eps=8), "8/255"), (dict(batch=10), "batch=10"),
    (dict(checkpoints=(100,)), "the last one the budget"), (dict(width=0), "width=0"),
    (dict(warm_up=20), "warm_up=20"), (dict(targets=()), "targets")])
def test_what_cannot_run_is_refused(over, what, tmp_path):
    with pytest.raises(UserError, match=what):
        sub.run(sub.Config.preset("smoke", data_root=tmp_path, **over))


def test_full_refuses_without_data(tmp_path):
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        sub.run(sub.Config.preset("full", data_root=tmp_path))
    assert not sub.check_data(tmp_path).usable and "cifar10: not found" in str(sub.check_data(tmp_path))


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, n=30, packed=True):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", n), ("t10k", 12)):
        for kind, data in (("images-idx3", rng.integers(0, 256, (count, 28, 28), np.uint8)),
                           ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(data)) if packed else idx(data))


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_and_fashion_are_told_apart(tmp_path, packed):
    write_mnist(tmp_path / "fashion-mnist", packed=packed)
    with pytest.raises(UserError, match="no mnist in"):
        sub.read_data("mnist", tmp_path)
    x, y = sub.read_data("fashion", tmp_path)["train"]
    assert x.shape == (30, 1, 28, 28) and x.dtype == np.uint8 and y[11] == 1
    assert "fashion: " + str(tmp_path) in str(sub.check_data(tmp_path)) and not sub.check_data(tmp_path).usable


@pytest.mark.parametrize("damage, what", [
    (lambda b: b[:-1], "bytes, but its header"), (lambda b: b[:9], "cut off"), (lambda b: b"", "not an idx"),
    (lambda b: b"\0\0\x0d" + b[3:], "not an idx")])
def test_damaged_idx(tmp_path, damage, what):
    path = tmp_path / "x"
    path.write_bytes(damage(idx(np.zeros((2, 3), np.uint8))))
    with pytest.raises(UserError, match=what):
        sub.read_idx(path)
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc" * 50)[:20])
    with pytest.raises(UserError, match="fetch the file anew"):
        sub.read_idx(tmp_path / "x.gz")


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_binary_and_python_agree(tmp_path, fine):
    rng = np.random.default_rng(0)
    a, b = tmp_path / "binary", tmp_path / "python"
    a.mkdir(), b.mkdir()
    names = {"train": "train", "test": "test"} if fine else {
        **{f"data_batch_{k}": f"data_batch_{k}" for k in range(1, 6)}, "test_batch": "test_batch"}
    for name in names:
        data, labels = rng.integers(0, 256, (4, 3072), np.uint8), rng.integers(0, 10, 4).astype(np.uint8)
        head = np.stack([labels // 2, labels], 1) if fine else labels[:, None]
        (a / f"{name}.bin").write_bytes(np.concatenate([head, data], 1).tobytes())
        key = "fine_labels" if fine else "labels"
        (b / name).write_bytes(pickle.dumps({"data": data, key: labels.tolist()}, protocol=2))
    one, two = sub.read_cifar(a, fine), sub.read_cifar(b, fine)
    for part in ("train", "test"):
        assert (one[part][0] == two[part][0]).all() and (one[part][1] == two[part][1]).all()
        assert one[part][0].shape == (4 if fine or part == "test" else 20, 3, 32, 32)
    (a / ("test.bin" if fine else "test_batch.bin")).write_bytes(b"1" * 3000)
    with pytest.raises(UserError, match="not records of"):
        sub.read_cifar(a, fine)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("run",)

    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        (tmp_path / name).write_bytes(pickle.dumps({"data": Bad(), "labels": []}))
    with pytest.raises(UserError, match="refused"):
        sub.read_cifar(tmp_path)


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n01\nn02\n")
    for name, value in (("n01", 10), ("n02", 200)):
        (root / "train" / name / "images").mkdir(parents=True)
        grey = Image.fromarray(np.full((64, 64), value, np.uint8))
        (grey if name == "n01" else grey.convert("RGB")).save(root / "train" / name / "images" / f"{name}_0.JPEG")
        grey.save(root / "val" / "images" / f"val_{name}.JPEG")
    (root / "val" / "val_annotations.txt").write_text(
        "val_n02.JPEG\tn02\t0\t0\t9\t9\nval_n01.JPEG\tn01\t0\t0\t9\t9\n")
    data = sub.read_data("tiny", tmp_path)
    assert data["train"][0].shape == (2, 3, 64, 64) and list(data["test"][1]) == [1, 0]
    assert abs(data["test"][0][0].mean() - 200) < 2
    (root / "val" / "val_annotations.txt").write_text("val_n02.JPEG\tn09\n")
    with pytest.raises(UserError, match="line 1: no class 'n09'"):
        sub.read_data("tiny", tmp_path)


def test_full_runs_on_files_in_the_released_format(tmp_path):
    write_mnist(tmp_path / "mnist")
    report = sub.run(sub.Config.preset(
        "full", data_root=tmp_path, n_seeds=1, rows=("DaST-like", "DDG", "JBDA"), **SMALL))
    assert report.metrics["JBDA"]["queries"] == [60] and report.preset == "full"


def test_real_fashion_mnist():
    folder = data_folder("fashion-mnist")
    assert sub.read_data("fashion", folder)["train"][0].shape == (60000, 1, 28, 28)


def test_an_audit_of_ones_own_models(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "import numpy as np\n"
        "def soft(x):\n"
        "    p = np.exp(8 * x.reshape(len(x), 8, 8)[:, 1:6, 1:3].reshape(len(x), 10))\n"
        "    return p / p.sum(1, keepdims=True)\n"
        "soft.budget = 150\n"
        "def hard(x):\n    return soft(x).argmax(1)\n"
        "hard.budget = 120\n"
        "def broken(x):\n    raise RuntimeError('no memory')\n"
        "def like(**more):\n"
        "    f = lambda x: soft(x)\n    f.__dict__.update(more)\n    return f\n"
        "three, one, many = like(classes=3), like(budget=1), like(budget=10**9, classes=1)\n"
        "images = np.zeros((6, 1, 8, 8))\n"
        "none, wraps = like(images=images, labels=[]), like(images=images, labels=[-1] * 6)\n"
        "loud, tiny = like(images=images + 2), like(shape=(1, 1, 1))\n"
        "def logits(x):\n    return np.log(soft(x))\n"
        "text = 'not callable'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)      # of another test
    config = sub.Config.preset("smoke", batch=50, width=4, test_images=60)
    wrong = {"broken": "no memory", "text": "cannot be called", "absent": "own_models", "three": "give it .images",
             "one": "budget=1", "many": "classes=1", "none": "labels of shape", "wraps": "integers from 0",
             "loud": r"in \[0, 1\]", "tiny": "4 by 4", "logits": "no probabilities"}
    names = [f"own_models:{n}" for n in ("soft", "hard", *wrong)] + [
        "https://example.org/api", "photo.jpg", "no_such:thing"]
    rows = sub.apply(names, out_dir=tmp_path / "out", config=config)
    soft, hard, *others = rows
    assert rows == read_json(tmp_path / "out" / "results.json") and [r["input"] for r in rows] == names
    assert soft["queries"] == 150 and soft["access"] == "probabilities" and 0 <= soft["attack_success"] <= 1
    assert hard["queries"] == 120 and hard["access"] == "labels" and 0 <= hard["agreement"] <= 1
    for row, what in zip(others, wrong.values()):
        assert re.search(what, row["error"]) and "queries" not in row, row
    assert all("not a local Python callable" in r["error"] for r in others[-3:-1]) and "no_such" in others[-1]["error"]
    assert (tmp_path / "out" / soft["substitute"]).exists() and (tmp_path / "out" / soft["questions"]).exists()
    # the function itself will do, and nothing is written unless it is asked for
    one = sub.apply(sys.modules.pop("own_models").hard, config=config)
    assert one[0]["agreement"] == hard["agreement"] and one[0]["weights"] == "the target's own answers"
