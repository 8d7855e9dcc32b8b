"""The head: fast equals literal, sharded equals whole; group rates; the experiment; lists of pairs; full scale."""
import csv
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from facebook_nb import cli, fpr
from facebook_nb.experiment import Claim, Report
from facebook_nb.files import UserError, read_json, read_weights, write_image
from facebook_nb.fpr import MATCHED, OURS, PENALTIES, Config, HeadSettings, Penalty
from facebook_nb.models.backbones import SmallResNet
from tests import fpr_child


def batch(B=24, n=60, d=12, pull=0.8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    W, y = torch.randn(n, d, generator=g, dtype=dtype), torch.randint(n, (B,), generator=g)
    x = torch.randn(B, d, generator=g, dtype=dtype) + pull * W[y]
    return x.requires_grad_(), W.requires_grad_(), y


def psi(t, base, m):
    """The margins, by autograd."""
    if base == "arcface":
        near = torch.cos(torch.acos(t) + m)
        return torch.where(t > math.cos(math.pi - m), near, t - m * math.sin(math.pi - m))
    return t - (m if base == "cosface" else 0)


def literal(x, W, y, s, m, base, p):
    """Every option, with matrices and sorts; W detached where the penalty must not reach it."""
    n, B, own = len(W), len(x), F.one_hot(y, len(W)).bool()
    unit = F.normalize(x)
    c, c_x = (unit @ F.normalize(w).T for w in (W, W.detach()))
    if p.detach == "none":
        c_x = c
    t, t_x = c[own][:, None], c_x[own][:, None]
    z = psi(t, base, m)
    hard = (c > t) & ~own & (p.negatives == "below_target")
    ranked = c[~own & ~hard].sort(descending=True).values
    if not len(ranked):
        return s * torch.where(own, z, c)
    k = math.ceil(np.float32(len(ranked)) * np.float32(1 / (n - 1))) if p.rate is None \
        else math.floor(p.rate * len(ranked)) + 1
    selected = (c > ranked[k - 1]) & ~own & ~hard
    assert selected.sum() < k or len(ranked) < B * (n - 1) or p.rate is None or selected.sum() == k - 1
    selected = selected & (c < z) if p.keep == "easy" else selected
    q = torch.where(selected & (c < z), c, torch.where(selected, c_x, torch.ones_like(c))) ** p.power * selected
    if p.average == "selected":
        rho = q.sum(1) / (selected & (c != 0)).sum(1).clamp_min(1)
    else:
        rho = q.sum(1) / (n - 1) / (p.rate or 1 / (n - 1))
    alpha = 1 + t_x if p.alpha is None else p.alpha
    return s * torch.where(own, z - alpha * rho[:, None], c)


VARIANTS = {
    "official": Penalty(), "paper": PENALTIES["paper"], "often": Penalty(rate=0.05),
    "paper often": Penalty(negatives="all", rate=0.05, average="rate", alpha=1.0, detach="none"),
    "rebuilt": PENALTIES["rebuilt"], "rebuilt often": replace(PENALTIES["rebuilt"], rate=0.1),
    "all": Penalty(negatives="all"), "no factor": Penalty(alpha=1.0), "through": Penalty(detach="none"),
    "unweighted": Penalty(power=0, average="rate"), "cubic": Penalty(power=3, alpha=0.5, detach="none", rate=0.02),
}


@pytest.mark.parametrize("base", fpr.BASES)
@pytest.mark.parametrize("name", VARIANTS)
def test_fast_equals_literal(base, name):
    for pull in (0.8, 0.1, -1.0):
        x, W, y = batch(pull=pull)
        up = torch.randn(24, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        theirs = literal(x, W, y, 16, 0.3, base, VARIANTS[name])
        ours, _ = fpr.penalised_logits(x, W, y, HeadSettings(60, 16, 0.3, base, VARIANTS[name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        for a, b in zip(*(torch.autograd.grad((z * up).sum(), (x, W)) for z in (ours, theirs))):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        loss, _ = fpr.penalised_loss(x, W, y, HeadSettings(60, 16, 0.3, base, VARIANTS[name]))
        theirs = F.cross_entropy(literal(x, W, y, 16, 0.3, base, VARIANTS[name]), y)
        torch.testing.assert_close(loss, theirs, rtol=1e-10, atol=1e-10)
        for a, b in zip(*(torch.autograd.grad(3 * l, (x, W)) for l in (loss, theirs))):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["official", "paper often"])
def test_threshold_in_long_rows_with_ties(name):
    """Several segments and a rest in each row, most values met many times."""
    g = torch.Generator().manual_seed(2)
    B, n, p = 40, 5000, VARIANTS[name]
    c = torch.randint(-50, 50, (B, n), generator=g) / 100
    t = torch.full((B,), 0.3)
    c[:, 7] = fpr.EXCLUDED
    found = fpr.false_positives(c, t, p, n)
    fits = c <= (0.3 if p.negatives == "below_target" else 2)
    ranked = c[fits & (c > -1.5)].sort(descending=True).values
    hard = int((~fits).sum())
    assert found.hard == hard and found.k == fpr.threshold_rank(p, B, n, hard)
    assert found.threshold == ranked[found.k - 1]
    mask = torch.zeros(B, n, dtype=torch.bool)
    i, j, v = found.entries()
    mask[i, j] = True
    assert torch.equal(mask, fits & (c > found.threshold)) and torch.equal(c[i, j], v)


def test_no_candidate_left_gives_the_base_loss():
    W = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))
    x = -W[:3]                                              # nothing is less alike than the own one
    hows = [HeadSettings(7, 8, 0.3, penalty=p) for p in (PENALTIES["official"], None)]
    y = torch.arange(3)
    (a, seen), (b, _) = (fpr.penalised_logits(x.requires_grad_(), W, y, how) for how in hows)
    assert torch.equal(a, b) and seen.k == 0 and seen.selected == 0 and math.isnan(seen.threshold)
    assert seen.hard == 18 and seen.extra.abs().max() == 0
    for z in (a, b):
        assert torch.isfinite(torch.autograd.grad(z.sum(), x)[0]).all()


def test_cross_entropy_is_that_of_torch():
    z = (30 * torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    y = torch.arange(20)
    ours, theirs = fpr.split_cross_entropy(z, y, HeadSettings(4000)), F.cross_entropy(z, y)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, z)[0] for loss in (ours, theirs)), atol=1e-7, rtol=1e-5)


def jobs():
    """Uneven classes and batches; a process without an own label; every strange case of the threshold."""
    for sizes in ([5, 9, 4], [6, 6, 6]):
        for base, name in (("cosface", "official"), ("arcface", "paper often"), ("softmax", "unweighted"),
                           ("cosface", "rebuilt often")):
            x, W, y = batch(B=sum(sizes), n=31, dtype=torch.float32)
            if sizes[0] == 6:
                y = y % 9                                   # all in the first process
            yield x.detach(), W.detach(), y, sizes, dict(classes=31, s=16.0, m=0.2, base=base, penalty=VARIANTS[name])


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_head_equals_the_whole(ranks, tmp_path):
    wholes, what = [], []
    for x, W, y, sizes, how in jobs():
        sizes = sizes if ranks == 3 else [sizes[0], sum(sizes[1:])]
        what.append(dict(x=x, W=W, y=y, sizes=sizes, how=how))
        x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
        z, seen = fpr.penalised_logits(x, W, y, HeadSettings(**how))
        loss = F.cross_entropy(z, y)
        wholes.append((z, loss, *torch.autograd.grad(loss, (x, W)), seen))
    fpr_child.start(ranks, tmp_path, "many", what)
    parts = [torch.load(tmp_path / f"many-{rank}.pt") for rank in range(ranks)]
    for job, (z, loss, d_x, d_W, seen) in enumerate(wholes):
        mine = [part[job] for part in parts]
        for part in mine:
            assert abs(part["loss"] - loss) <= 1e-5
            assert part["info"][:4] == [a.item() for a in seen[2:6]]
            torch.testing.assert_close(part["rho"], seen.rho)
        torch.testing.assert_close(torch.cat([part["z"] for part in mine], 1), z, rtol=1e-5, atol=1e-4)
        for key, whole in (("d_x", d_x), ("d_W", d_W)):
            found = torch.cat([part[key] for part in mine])
            assert (found - whole).abs().max() <= 1e-5 * max(1, whole.abs().max()), (job, key)
    assert {tuple(part["d_W"].shape)[0] for part in (p[0] for p in parts)} == ({15, 16} if ranks == 2 else {10, 11})


def test_a_sharded_head_is_trained_and_resumed_by_any_number_of_processes(tmp_path):
    """As one process that nobody stopped does it, prototypes and momentum: only sums are in another order (float64)."""
    whole = fpr_child.train(11)

    def fit(ranks, *jobs):
        fpr_child.start(ranks, tmp_path, "fitted", [dict(classes=11, **job) for job in jobs])
        return [*zip(*(torch.load(tmp_path / f"fitted-{rank}.pt") for rank in range(ranks)))]

    def equal(parts):
        for part in parts:
            torch.testing.assert_close(part["body"], whole["body"], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(part["loss"], whole["loss"], rtol=1e-6)      # kept in float32
        for key in ("weight", "momentum"):
            torch.testing.assert_close(torch.cat([part[key] for part in parts]), whole[key], rtol=1e-9, atol=1e-12)
        assert [len(part["weight"]) for part in parts] == {1: [11], 2: [5, 6], 3: [3, 4, 4]}[len(parts)]

    two, three, one = (tmp_path / name for name in ("two", "three", "one"))
    fit(2, dict(folder=two, stop=5))
    shutil.copytree(two, tmp_path / "two again")
    assert fpr_child.train(11, folder=one, stop=5) is None
    for found in fit(3, {}, dict(folder=two), dict(folder=three, stop=5))[:2]:          # uninterrupted; 2 -> 3
        equal(found)
    for found in fit(2, dict(folder=three), dict(folder=one)):                          # 3 -> 2; 1 -> 2
        equal(found)
    equal([fpr_child.train(11, folder=tmp_path / "two again")])                         # 2 -> 1
    for folder, ranks in ((two, 3), (three, 2), (one, 2), (tmp_path / "two again", 1)):     # what others left is gone
        assert sorted(p.name for p in folder.glob("*/step-*")) == sorted(
            ["step-000006.safetensors", *(f"step-000006.rank-{r}.safetensors" for r in range(ranks) if ranks > 1)])


def test_head_on_a_device_in_bf16(device):
    x, W, y = batch(dtype=torch.float32)
    head = fpr.FPRHead(12, 60).to(device)
    with torch.no_grad():
        head.weight.copy_(W)
    with torch.autocast(device.type, torch.bfloat16):
        loss = head(x.detach().to(device), y.to(device))
    z, _ = fpr.penalised_logits(x, W, y, HeadSettings(60))
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(z, y), rtol=1e-4, atol=1e-4)
    loss.backward()
    assert torch.isfinite(head.weight.grad).all()


def test_start_does_not_depend_on_the_processes():
    torch.manual_seed(0)
    whole = fpr._first_prototypes(3, 10, 0, 10, block=4)
    torch.manual_seed(0)
    assert torch.equal(fpr._first_prototypes(3, 10, 3, 9, block=4), whole[3:9])
    assert 0.005 < whole.std() < 0.02


@pytest.mark.parametrize("change, message", [
    (dict(classes=1), "classes=1"), (dict(base="sphere"), "sphere"), (dict(penalty="strong"), "strong"),
    (dict(s=0.0), "s=0"), (dict(s=math.nan), "s=nan"), (dict(m=4.0, base="arcface"), "m=4"), (dict(m=-0.1), "m=-0.1")])
def test_head_refuses(change, message):
    with pytest.raises(UserError, match=message):
        fpr.FPRHead(**dict(dim=4, classes=5) | change)


@pytest.mark.parametrize("change", [
    dict(negatives="none"), dict(rate=0.0), dict(rate=1.0), dict(power=-1), dict(average="sum"), dict(detach="all"),
    dict(alpha=math.nan), dict(alpha=-1.0)])
def test_penalty_refuses(change):
    with pytest.raises(UserError, match=f"penalty: {[*change][0]}"):
        Penalty(**change)


@pytest.mark.parametrize("x, y, message", [
    (torch.ones(2, 3), [1, 5], "classes 1 to 5: the head has 0 to 4"), (torch.ones(0, 3), [], "no images"),
    (torch.ones(2, 3), [1.0, 2.0], "integers"), (torch.ones(2, 3), [[1], [2]], r"classes \(2, 1\)"),
    (torch.ones(2, 4), [1, 2], r"\(B, 3\) floating"),
    (torch.tensor([[1.0, 2, 3], [1, math.nan, 3]]), [1, 2], "1 of 2")])
def test_a_batch_that_makes_no_sense_is_said(x, y, message):
    y = torch.tensor(y) if y else torch.zeros(0, dtype=torch.long)
    with pytest.raises(UserError, match=message):
        fpr.FPRHead(3, 5)(x, y)


def test_a_rate_at_which_nothing_is_penalised_is_said():
    fpr._warn_if_idle.cache_clear()
    with pytest.warns(UserWarning, match="r_u=0.0001 of 4 × 9 cosines leaves none"):
        fpr.FPRHead(3, 10, penalty="paper")(torch.randn(4, 3), torch.arange(4))


def test_group_rates_by_hand():
    scores = [0.9, 0.4, 0.6, 0.1, 0.8, 0.7, 0.2, 0.3, 0.99]
    same = [1, 1, 0, 0, 1, 1, 0, 0, 0]
    group = ["a"] * 4 + ["b"] * 4 + [""]                    # the last is a pair of two groups
    rates = fpr.group_rates(scores, same, group, threshold=0.5)
    assert rates.groups == ("a", "b") and rates.fmr.tolist() == [0.5, 0] and rates.fnmr.tolist() == [0.5, 0]
    assert rates.pooled_fmr == 0.25 and rates.pooled_fnmr == 0.25
    assert rates.std_fmr == 0.25 and math.isinf(rates.ratio_fmr)
    strict = fpr.group_rates(scores, same, group, threshold=0.95)
    assert strict.ratio_fmr == 1 and strict.std_fmr == 0 and strict.fnmr.tolist() == [1, 1]


def test_group_rates_set_the_threshold_from_all_groups():
    rng = np.random.default_rng(0)
    group, same = rng.integers(3, size=6000), rng.random(6000) < 0.4
    scores = rng.normal(2 * same + 0.3 * group)
    rates = fpr.group_rates(scores, same, group, far=0.01)
    below = np.sort(scores[~same])
    assert rates.pooled_fmr <= 0.01 < (scores[~same] >= rates.threshold).mean() + 1 / len(below)
    assert rates.groups == ("0", "1", "2") and (np.diff(rates.fmr) > 0).all()
    assert abs(rates.ratio_fmr - rates.fmr[2] / rates.fmr[0]) < 1e-12
    with pytest.raises(UserError, match="FAR 0.0001"):
        fpr.group_rates(scores, same, group, far=1e-4)
    with pytest.raises(UserError, match="group 1: 0 genuine"):
        fpr.group_rates(scores, same & (group != 1), group, far=0.01)
    with pytest.raises(UserError, match="not finite"):
        fpr.group_rates(np.where(np.arange(6000) == 3, np.nan, scores), same, group)
    with pytest.raises(UserError, match="one of each"):
        fpr.group_rates(scores[1:], same, group)


def test_benchmark_has_its_rows():
    rows = fpr.benchmark(batch=8, classes=300, dim=16, repeats=1)
    assert [row["row"] for row in rows][-1] == "CosFace + FPR" and rows[0]["over_plain"] == 1
    assert all(0 < row["seconds"] < 60 for row in rows)


# --- the experiment

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    config = Config.preset("smoke", out_dir=tmp_path_factory.mktemp("fpr") / "run", people=(3, 4), steps=(4, 5),
                           test_people=4, trunk_people=2, trunk_steps=3, camera_people=4, batch_size=16, alphas=())
    return config, fpr.run(config)


def test_a_run_resumes_and_leaves_its_parts(smoke):
    config, report = smoke
    assert {OURS, MATCHED, fpr.ORACLE, fpr.UNTRAINED, f"{OURS}, 3 a group"} < set(report.metrics)
    assert report.roles == {MATCHED: "baseline", fpr.UNTRAINED: "trivial", fpr.ORACLE: "ceiling"}
    assert abs(report.mean(OURS, "margin") - report.mean(MATCHED, "margin")) < 1e-6
    assert report.mean(OURS, "margin") > report.mean("CosFace", "margin") == config.m
    assert report.claim.verdict == "undecided" and len(report.mechanism) == 3 * 2 + 1
    again = fpr.run(config)
    assert again.metrics == report.metrics and again.seconds == report.seconds
    assert {"camera.weight", "top.0.weight"} < set(read_weights(config.out_dir / "weights.safetensors"))


def test_people_differ_from_seed_to_seed_and_between_parts(smoke):
    config, _ = smoke
    camera = dict(np.load(config.out_dir / "steps" / "camera.npz"))
    camera.pop("_about")
    see = lambda *what: fpr.see_crowd(config, camera, *what)["features"]
    first = see(0, "train", 1)[:2]
    assert all((first - see(*other)[:2]).abs().max() > 0.1 for other in ((0, "test", 1), (1, "train", 1)))
    parts = [{"features": np.full((6, 2, 3), g), "person": np.arange(6) // 2} for g in range(4)]
    f, person, group = fpr.take_people(parts, 2)
    assert f.shape == (16, 2, 3) and (f[:, 0, 0] == group).all()
    assert person.tolist() == np.arange(8).repeat(2).tolist() and group.tolist() == np.arange(4).repeat(4).tolist()


def test_rows_share_start_and_batches():
    """A margin added in every step is a CosFace with this margin."""
    config = Config.preset("smoke", batch_size=8)
    rng = np.random.default_rng(0)
    crowd = rng.normal(size=(40, 2, 32)).astype(np.float32), np.arange(40) // 4, np.arange(40) // 20
    row = lambda m, extra=None: fpr.train_row(config, 3, 4, crowd, crowd, "cosface", m, extra=extra)
    a, b, c = row(0.3), row(0.2, np.full(4, 0.1)), row(0.2)
    np.testing.assert_allclose(a["top.0.weight"], b["top.0.weight"], rtol=1e-4, atol=1e-6)
    assert abs(a["top.0.weight"] - c["top.0.weight"]).max() > 1e-4 and abs(a["margin"] - b["margin"]) < 1e-6


@pytest.mark.parametrize("ours, verdict", [([.20, .21, .19], "shown"), ([.20, .35, .24], "undecided"),
                                           ([.31, .32, .30], "refuted")])
def test_the_rule_of_the_claim(smoke, ours, verdict):
    config, report = smoke
    matched = {m: [.25, .26, .25] if m == "log std" else [1.0, 1.1, 1.2] for m in fpr.METRICS}
    rows = {row: dict(matched) for row in report.metrics}
    rows[OURS] |= {"log std": ours, "train Gini": [.5, .6, .7], "loss before": [1.02, 1.11, 1.21]}
    made = Report("fpr", "book", [0, 1, 2], rows, Claim("", 0, None), 0.0)
    fpr.judge_report(config, made)
    assert made.claim.verdict == verdict and "new people" in made.claim.text
    holds = {c.text.split(":")[0]: c.holds for c in made.mechanism}
    assert holds["training images against training prototypes, 4 identities a group"]
    assert not holds["pairs of test images, 4 identities a group"] and holds["every training has levelled off"]


def test_a_link_finds_who_is_confused():
    W = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.4, 0], [0, 1, -1], [0, 0, 1]]), dim=1)
    link = fpr.prototype_link(W, W, np.arange(4), np.array([0, 0, 1, 1]), np.arange(4), far=2 / 12)
    assert link["rates"].tolist() == [2, 0] and link["Gini"] == 0.5
    images = W[[0, 0, 2]]               # of new people: nothing is their own
    link = fpr.prototype_link(images, W, np.array([0, 0, 1]), np.array([0, 0, 1]), far=3 / 12)
    assert link["rates"].tolist() == [1, 1]


def test_persons_and_gini():
    e = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.05], [0, 1], [0.2, -1], [0, 1]]), dim=1)
    pairs = fpr.inside_pairs(e, np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1]))
    assert len(pairs.scores) == 6 + 1 and set(pairs.group) == {0, 1}
    no = ~pairs.same
    rates = fpr.person_rates(pairs.scores[no] > 0.9, pairs.i[no], pairs.j[no], 3)
    assert rates.tolist() == [0.5, 0.5, 0]
    assert fpr.gini(np.zeros(5)) == 0 and abs(fpr.gini(np.array([1, 2, 3])) - 2 / 9) < 1e-12


# --- lists of pairs

def write_table(path, rows, head=("image1", "image2", "same", "group")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two groups of five people with five pictures, and a table of all pairs; two of its pictures are damaged."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    names = []
    for g in "ab":
        for p in range(5):
            face = rng.integers(0, 256, (8, 8, 3)).repeat(14, 0).repeat(14, 1)
            for k in range(5):
                image = face * 0.8 + rng.integers(0, 50, (112, 112, 3))
                write_image(root / f"{g}{p}-{k}.png", image.astype(np.uint8))
                names.append(f"{g}{p}-{k}.png")
    (root / "b4-4.png").write_bytes(b"nothing")
    (root / "a0-0.png").unlink()
    rows = [(x, y, int(x[:2] == y[:2]), x[0] if x[0] == y[0] else "") for i, x in enumerate(names) for y in names[:i]]
    return write_table(root / "pairs.csv", rows)


def test_apply_judges_groups_and_names_damaged_pictures(smoke, pictures, tmp_path):
    weights = smoke[0].out_dir / "weights.safetensors"
    first, gone = fpr.apply([pictures, tmp_path / "gone.csv"], weights, tmp_path / "out")
    assert "no such file" in gone["error"] and first["weights"] == gone["weights"] == str(weights)
    assert {d["picture"] for d in first["damaged"]} == {"a0-0.png", "b4-4.png"}
    assert first["faces"] == {"given aligned": 48}
    assert set(first["groups"]) == {"a", "b"} and first["groups"]["a"]["impostor_pairs"] == 250 - 20
    rates = [g["fmr"] for g in first["groups"].values()]
    assert abs(first["std_fmr"] - np.std(rates)) < 1e-6 and first["pairs"] == 2 * (300 - 24)
    assert first["fmr"] <= fpr.report_rate(460) == 0.1 and first["intervals_over"] == "people"
    assert read_json(tmp_path / "out" / "results.json") == [first, gone]
    assert (tmp_path / "out" / first["picture"]).stat().st_size > 1000


def scored(n=4000, seed=1, groups=("x", "y")):
    rng = np.random.default_rng(seed)
    same, group = rng.random(n) < 0.3, rng.choice(groups, n)
    return np.round(rng.normal(2.0 * same), 3), same.astype(int), group


def test_apply_takes_scores_as_they_are(tmp_path):
    score, same, group = scored(groups=("x", "y", ""))
    table = write_table(tmp_path / "s.csv", zip(score, same, group), ("score", "same", "group"))
    [row] = fpr.apply(table)                                                # one path is one list
    expected = fpr.group_rates(score, same, group, 1e-2)
    assert row["threshold"] == expected.threshold and row["std_fmr"] == expected.std_fmr and not row["warnings"]
    assert abs(row["groups"]["y"]["fnmr"] - expected.fnmr[1]) < 1e-6 and "scores as given" in row["weights"]
    for g in row["groups"].values():
        assert g["fmr_interval"][0] <= g["fmr"] <= g["fmr_interval"][1]
    bfw = write_table(tmp_path / "bfw.csv", zip(score, same, group, np.where(group == "", "z", group)),
                      ("score", "label", "att1", "att2"))
    assert fpr.apply([bfw])[0]["std_fmr"] == row["std_fmr"]                 # names as BFW has them
    text = table.read_text()
    for name, changed in (("semicolons", text.replace(",", ";")), ("tabs", text.replace(",", "\t")),
                          ("heads", text.replace("score,same,group", " Score, SAME ,Group")),
                          ("points", text.replace(",", ";").replace(".", ","))):
        (tmp_path / "t.csv").write_text(changed)
        assert fpr.apply(tmp_path / "t.csv")[0].get("std_fmr") == row["std_fmr"], name


@pytest.mark.parametrize("change, words", [
    (lambda s, y, g: (-s, y, g), "look like distances"), (lambda s, y, g: (0 * s + .5, y, g), "all scores are 0.5"),
    (lambda s, y, g: (s, y, np.full(len(s), "x")), "one group")])
def test_scores_that_compare_nothing_are_told(change, words, tmp_path):
    table = write_table(tmp_path / "s.csv", zip(*change(*scored())), ("score", "same", "group"))
    [row] = fpr.apply([table])
    assert words in row["warnings"][0] and row["ratio_fmr"] is None and row["std_fmr"] is None


def test_intervals_are_over_people():
    """Half of the people have all errors: the interval is that of people, not of their many pairs."""
    n, each = 30, 40
    who = np.repeat(np.arange(n), each)
    low, high = fpr.person_intervals(np.isin(who, range(n // 2)), who, who)
    half = 1.96 * (0.25 / n) ** 0.5
    assert abs(low - (0.5 - half)) < 0.06 and abs(high - (0.5 + half)) < 0.06
    assert fpr.person_intervals(np.zeros(5, bool), np.arange(5), np.arange(5)) == (0, 1 - 0.025 ** 0.2)


@pytest.mark.parametrize("text, message", [
    ("image1,same\na,1\n", "no column group, image2"),
    ("score,same,group\n1,maybe,x\n", "line 2: column same is 'maybe'"),
    ("score,same,group\nhigh,1,x\n", "line 2: score 'high' is no number"), ("score,same,group\n", "no pairs"),
    ("score,same,group\n0.5,1,x\n0.4,0,x\n", "1 impostor pairs"), ("", "no column same"),
])
def test_tables_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    [row] = fpr.apply([tmp_path / "t.csv"])
    assert message in row["error"]


def test_a_pickle_is_not_opened_and_a_picture_is_no_list(tmp_path):
    (tmp_path / "t.pkl").write_bytes(b"x")
    pickle, array = fpr.apply([tmp_path / "t.pkl", np.zeros((8, 8, 3), np.uint8)])
    assert "can run programs" in pickle["error"] and "path of a table" in array["error"]


def test_groups_without_a_name_are_said():
    score, same, group = scored(100)
    for nothing in (None, float("nan")):
        with pytest.raises(UserError, match="group: 1 of 100 are missing"):
            fpr.group_rates(score, same, np.array([nothing, *group[1:]], dtype=object))


# --- full scale

RACES = ("African", "Asian", "Caucasian", "Indian")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A training set, RFW's lists and BFW's table in their layouts, with few pictures."""
    root, rng = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)

    def faces(folder, people, each, name):
        for p in range(people):
            for k in range(1, each + 1):
                write_image(root / folder / name.format(p=p, k=k), rng.integers(0, 256, (112, 112, 3), np.uint8))

    (root / "train").mkdir()
    for race in RACES[:2]:
        faces(f"train/race_per_7000/{race}", 3, 2, "m.{p}/{k}.jpg")
    lists = []
    for race in RACES:
        faces(f"rfw/data/{race}", 4, 3, "m.{p}/m.{p}_{k:04d}.jpg")
        every = [(p, k) for p in range(4) for k in range(1, 4)]
        lines = [f"m.{a}\t{i}\t{j}" if a == b else f"m.{a}\t{i}\tm.{b}\t{j}"
                 for n, (a, i) in enumerate(every) for b, j in every[:n]]
        folder = root / "rfw" / "txts" / race
        folder.mkdir(parents=True)
        (folder / f"{race}_pairs.txt").write_text("\n".join(rng.permutation(lines)))
        lists += lines
    rows = []
    for att in ("AF", "WM"):
        faces(f"bfw/{att}", 5, 3, "{p}/{k}.jpg")
        names = [f"{att}/{p}/{k}.jpg" for p in range(5) for k in range(1, 4)]
        rows += [(1, a, b, int(a[:4] == b[:4]), att, att) for n, a in enumerate(names) for b in names[:n]]
    write_table(root / "bfw" / "table.csv", rows,
                ("fold", "p1", "p2", "label", "att1", "att2"))
    return root


SETTINGS = dict(network="tiny", batch_size=6, epochs=1, workers=0, precision="no")


def test_the_full_preset_runs_on_the_real_formats_with_one_process_and_three(stored, tmp_path, monkeypatch):
    assert fpr.check_data(stored).usable and "RFW" in str(fpr.check_data(stored))
    assert not fpr.check_data(stored / "rfw").usable                        # `full` would not start
    monkeypatch.setitem(fpr.NETWORKS, "tiny", lambda: SmallResNet(512, 2, 112))
    config = Config.preset("full", data_root=stored, out_dir=tmp_path / "one", **SETTINGS)
    report = fpr.run(config)
    assert [*report.metrics] == [OURS, "CosFace", MATCHED]
    assert {"RFW African", "BFW WM", "TAR", "std of accuracy"} < set(report.metrics[OURS])
    assert (tmp_path / "one" / "weights.safetensors").is_file()
    assert fpr.run(config).metrics == report.metrics                        # nothing is trained again
    fpr_child.start(3, tmp_path, "full", dict(root=stored, out=tmp_path / "three",
                                              settings=SETTINGS | dict(rows=(OURS,))))
    three = [torch.load(tmp_path / f"full-{rank}.pt") for rank in range(3)]
    assert three[0] == three[1] == three[2] and [*three[0]] == [OURS]
    assert list((tmp_path / "three" / "work").rglob("step-*.safetensors"))


def test_a_dry_run_tells_what_full_would_take(stored, monkeypatch):
    monkeypatch.setitem(fpr.NETWORKS, "tiny", lambda: SmallResNet(512, 2, 112))
    told = CliRunner().invoke(cli.app, [
        "run", "fpr", "--preset", "full", "--data-root", str(stored), "--devices", "2", "--dry-run",
        *(x for k, v in SETTINGS.items() for x in ("--set", f"{k}={v}"))])
    for words in ("12 images, 6 people", "a row", "fpr: of 2 devices", "in all"):
        assert words in told.stdout, told.output
    assert told.exit_code == 0 or "raise workers (--set workers=" in str(told.exception)    # as fast as it is today


def test_full_lists_what_is_missing(stored, tmp_path):
    (tmp_path / "train" / "ann").mkdir(parents=True)
    with pytest.raises(UserError, match="missing rfw with RACE_test.bin.*no images in folders.*network 'huge'"):
        fpr.run(Config.preset("full", data_root=tmp_path, network="huge"))
    with pytest.raises(UserError, match="needs a folder"):
        fpr.run(Config.preset("full"))
    report = fpr.check_data(tmp_path)
    assert not report.usable and "missing rfw" in str(report) and "no images in folders" in str(report)
    assert "pairs" in str(fpr.check_data(stored / "rfw")) and "pairs" in str(fpr.check_data(stored / "bfw"))
    with pytest.raises(UserError, match="needs 'CosFace"):
        fpr.run(replace(Config.preset("full", data_root=stored, rows=(MATCHED,)), out_dir=tmp_path / "r"))
