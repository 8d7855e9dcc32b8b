"""The substitute chapter: the door, the losses, the attacks, the loop, the readers and the audit."""
import gzip
import pickle
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


def test_verdicts_of_a_perfect_substitute():
    config = sub.Config.preset("book", **SMALL)
    dreams = sub.Dreams(sub.ROWS["DDG + AST"], (1, 4, 4), 3, config)
    s = linear()
    found = sub.verdicts(s, dreams, sub.Door(s, 3, 0), config, 0, "adversarial")
    assert found["wrong at x"] == found["wrong nearby"] == 0 and found["moves T"] == found["moves S"] > 0.2
    assert (found["said"][..., 0] == found["said"][..., 1]).all() and found["pairs"].shape == (20, 2, 1, 4, 4)
    fixed = sub.Door(lambda x: np.eye(3)[np.zeros(len(x), int)], 3, 0)
    found = sub.verdicts(s, dreams, fixed, config, 0, "random")
    assert found["moves T"] == 0 and found["wrong at x"] > 0


def test_training_on_attacks_hardens_a_target():
    config = sub.Config.preset("book", target_steps=150)
    data = sub.split(sub.read_data("digits", None), config, 0)
    x, y = data["test"]
    left = {}
    for name in ("cnn", "hardened"):
        target = sub.make_target(name, *data["target"], 10, config, 0)
        adv = sub.sign_attack(target, x, y, 0.2, 0.05, 8)
        left[name] = (target(adv).argmax(1) == y).float().mean()
    assert left["hardened"] > left["cnn"] + 0.1


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
    over = dict(
        SMALL, rows=("DaST-like", "DDG", "DDG + AST", "DDG + random ε", "real images"), targets=("cnn", "forest"),
        students=("mlp",), hard_rows=("DDG",))
    one = sub.run(sub.Config.preset("smoke", out_dir=tmp_path / "a", **over))
    (tmp_path / "a" / "metrics.json").unlink()
    next((tmp_path / "a" / "steps").rglob("*AST.npz")).unlink()
    again = sub.run(sub.Config.preset("smoke", out_dir=tmp_path / "a", **over))
    assert one.metrics == again.metrics or np.testing.assert_equal(one.metrics, again.metrics) is None
    told = read_json(tmp_path / "a" / "metrics.json")
    assert told["metrics"]["DDG + AST"]["queries"]["mean"] == 60
    assert {"random ± ε", "white box", "targets", "GD-UAP", "Cosine-UAP", "stand-in", "DDG by mlp", "hardened target",
            "DDG, hardened", "white box, hardened"} < set(told["metrics"])
    assert told["metrics"]["GD-UAP"]["queries"]["mean"] == 0
    assert one.arrays["pgd by student"].shape == (2, 1, 2) and one.arrays["images DDG"].shape == (2, 10, 2, 1, 8, 8)
    assert one.arrays["pairs DDG + AST"].shape == (20, 2, 1, 8, 8)
    assert one.arrays["curve real images"].shape == (1, 2, 2, 3)
    assert set(read_weights(tmp_path / "a" / "weights.safetensors")) == set(
        sub.network("small", (1, 8, 8), 10).state_dict())


def test_the_plane_holds_its_corners():
    x = torch.rand(3, 1, 4, 4)
    flat = sub.plane(x, 5).view(5, 5, 1, 4, 4)          # -0.5, 0, 0.5, 1, 1.5 along each axis
    for k, (row, column) in enumerate(((1, 1), (1, 3), (3, 1))):
        torch.testing.assert_close(flat[row, column], x[k])
    torch.testing.assert_close(flat[2, 2], (x[1] + x[2]) / 2)


def test_paired_interval():
    mean, half = sub.paired([[1, 2], [3, 4]], [[0, 1], [2, 3]])
    assert mean == 1 and half == 0
    assert sub.paired([1], [0])[1] == float("inf")
    assert abs(sub.area([(0, 0, 0.0), (10, 0, 1.0), (30, 0, 1.0)]) - 25 / 30) < 1e-9


@pytest.mark.parametrize("over, what", [
    (dict(rows=("DGD",)), "no row 'DGD'"), (dict(devices=2), "devices=1"), (dict(data="cifar10"), "cifar-10-batches")])
def test_what_cannot_run_is_refused(over, what, tmp_path):
    with pytest.raises(UserError, match=what):
        sub.run(sub.Config.preset("smoke", data_root=tmp_path, **over))


def test_full_refuses_without_data(tmp_path):
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        sub.run(sub.Config.preset("full", data_root=tmp_path))
    assert not sub.check_data(tmp_path).usable and "cifar-10" in str(sub.check_data(tmp_path))


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
    assert sub.check_data(tmp_path).usable and "fashion" in str(sub.check_data(tmp_path))


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
        "full", data_root=tmp_path, n_seeds=1, rows=("DDG + AST", "JBDA"), **SMALL))
    assert report.metrics["DDG + AST"]["queries"] == [60] and report.preset == "full"


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
        "text = 'not callable'\n")
    monkeypatch.chdir(tmp_path)
    config = sub.Config.preset("book", batch=50, width=4, replay=1, test_images=60)
    names = ["own_models:soft", "own_models:hard", "own_models:broken", "own_models:text", "own_models:none",
             "https://example.org/api", "photo.jpg", "no_such:thing"]
    rows = sub.apply(names, out_dir=tmp_path / "out", config=config)
    sys.modules.pop("own_models")
    assert rows == read_json(tmp_path / "out" / "results.json") and [r["input"] for r in rows] == names
    soft, hard, broken, *refused = rows
    assert soft["queries"] == 150 and soft["access"] == "probabilities" and 0 <= soft["attack_success"] <= 1
    assert hard["queries"] == 120 and hard["access"] == "labels" and 0 <= hard["agreement"] <= 1
    assert "no memory" in broken["error"] and all("error" in r for r in refused)
    assert "not a local Python callable" in refused[2]["error"]
    assert (tmp_path / "out" / soft["substitute"]).exists() and (tmp_path / "out" / soft["questions"]).exists()
