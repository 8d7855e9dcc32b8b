"""D2AM: the world, fast forms equal literal ones, clustering, readers, settings, a run, apply."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call
from torch.nn import functional as F

from facebook_nb import d2am
from facebook_nb.d2am import OURS, ROWS, Config, Look, Terms, check_data, equal_error, errors, meta_loss
from facebook_nb.files import UserError, read_image, write_image, write_weights
from facebook_nb.readers import spoof as readers
from facebook_nb.worlds import spoof as world
from facebook_nb.worlds.forgery import render_clips
from facebook_nb.worlds.motion import write_video
from tests.conftest import data_folder

SMALL = {"people": 8, "photos": 1, "live": 12, "exam": 12, "sites": 4, "unseen": 1, "epochs": 2, "epoch_steps": 1,
         "width": 0.5, "n_seeds": 1}


def g(name=0):
    return torch.Generator().manual_seed(name)


@pytest.fixture(scope="module")
def subjects():
    return world.render_subjects(8, 2, seed=1)


@pytest.fixture(scope="module")
def sets():
    return d2am.world_sets(Config.preset("book", **SMALL), 100)


def batch(K=3, b=2, side=24):
    net = d2am.build(Config.preset("book", width=0.5)).train()
    x = torch.rand(K * 2 * b, 6, side, side, generator=g())
    y = torch.tensor([1] * b + [0] * b).repeat(K)
    return net, x, y, torch.rand(len(x), 1, side // 4, side // 4, generator=g())


# the world
def test_jpeg_is_close_to_pillow(subjects):
    import io
    image = subjects.maps[0, :3].permute(1, 2, 0).contiguous().numpy()
    for quality in (30, 85):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=quality, subsampling=0)
        pillow = np.asarray(Image.open(file), float)
        ours = world.jpeg(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, torch.tensor([quality]))
        ours = 255 * ours[0].permute(1, 2, 0).numpy()
        loss = np.abs(pillow - image).mean()
        assert np.abs(ours - pillow).mean() < 0.25 * loss + 1, quality


def test_photographs_repeat_and_differ_by_site_and_attack(subjects):
    def shots(**change):
        rows = dict(face=0, attack=0, site=0, session=0) | change
        return world.Shots(*(torch.tensor([rows[k]]) for k in rows), torch.full((1, 24), 0.5))

    take = lambda **change: world.photograph(subjects.maps, shots(**change), g()).float()
    live = take()
    assert live.shape == (1, 3, 48, 48) and torch.equal(live, take())
    for change in ({"attack": 1}, {"attack": 2}, {"site": 1}, {"session": 1}, {"face": 1}):
        assert (live - take(**change)).abs().mean() > 2, change
    depth = world.depth_maps(subjects.maps, shots())
    assert depth[0, 0, 6, 6] > depth[0, 0, 0, 0] and depth.max() <= 1
    assert not world.depth_maps(subjects.maps, shots(attack=2)).any()


def test_each_site_has_its_own_instruments():
    paper = [float((world.plan_shots(torch.arange(4), s, 0, 400, g()).attack == 1).float().mean()) for s in range(4)]
    assert np.abs(np.array(paper) - [s.prints for s in world.SITES]).max() < 0.1


def test_people_and_unseen_sites_are_disjoint(sets):
    people = [set(sets[k].person.tolist()) for k in ("train", "dev", "test")]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    for name, sites in (("train", [0, 1, 2]), ("dev", [0, 1, 2]), ("test", [3]), ("all", [0, 1, 2, 3])):
        s = sets[name]
        assert s.site.unique().tolist() == sites and s.live.float().mean() == 0.5
        assert ((s.attack == 0) == (s.live == 1)).all()
    skewed = d2am.world_sets(Config.preset("book", **SMALL, skew=0.3), 100)["train"]
    shares = [float(skewed.live[skewed.site == k].float().mean()) for k in range(3)]
    assert max(shares) - min(shares) > 0.15


def test_sites_are_drawn_and_their_cues_flip(subjects):
    drawn = d2am.drawn_sites(8, 2, 4, 0.03, 0)
    cues = [s.cue for s in drawn]
    assert sum(c > 0 for c in cues[:6]) == 4 and all(c < 0 for c in cues[6:])
    assert d2am.drawn_sites(8, 2, 4, 0.03, 1)[0].balance != drawn[0].balance
    red = []
    for cue in (0.1, -0.1):
        sites = (drawn[0]._replace(cue=cue),)
        shots = world.plan_shots(torch.arange(4), 0, 4, 4, g(), sites)
        x = world.photograph(subjects.maps, shots, g()).float()
        tint = (x[:, 0] - x[:, 2]).mean((1, 2))
        red.append(float(tint[:4].mean() - tint[4:].mean()))
    assert red[0] - red[1] > 20                             # live faces turn red, or blue


# the method
def test_style_without_forming_the_maps():
    F1, a = torch.randn(3, 5, 6, 7, generator=g()), torch.rand(3, 5, generator=g())
    var, mean = torch.var_mean(F1, (2, 3))
    look = Look([], [mean], [var], [a])
    for of, w in (("domain", 1 - a), ("task", a), ("plain", torch.ones_like(a))):
        maps = w[..., None, None] * F1
        literal = torch.cat([maps.mean((2, 3)), (maps.var((2, 3)) + 1e-5).sqrt()], 1)
        torch.testing.assert_close(d2am.domain_features(look, of), literal)
    net, x, *_ = batch()
    look = net.E.eval()(x)
    for maps, mean, var, a in zip(look.maps, look.mean, look.var, look.gates):      # maps = a·F
        torch.testing.assert_close(a * mean, maps.mean((2, 3)))
        torch.testing.assert_close(a**2 * var, maps.var((2, 3)))


@pytest.mark.parametrize("norm, cut", [("domain", False), ("domain", True), ("step", True)])
def test_meta_step_equals_its_literal_form(norm, cut):
    net, x, y, depth = batch()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    own, total, thetas = dict(net.M.named_parameters()), 0, []
    if norm == "step":                          # everything passes together, each domain takes its part
        whole = net.E(x)
        looks, logits = d2am.split(whole, 3), net.M(whole.maps[-1])[0].chunk(3)
        depths = net.D(whole.maps).chunk(3)
    for k in range(3):
        xk, yk, dk = (t.chunk(3)[k] for t in (x, y, depth))
        look = net.E(xk) if norm == "domain" else looks[k]
        total = total + 10 * F.mse_loss(net.D(look.maps) if norm == "domain" else depths[k], dk)
        total = total + 0.01 * d2am.confusion_loss(net.E, look, yk)
        if k < 2:
            logit = net.M(look.maps[-1])[0] if norm == "domain" else logits[k]
            L = F.binary_cross_entropy_with_logits(logit, yk.float())
            grad = torch.autograd.grad(L, own.values(), create_graph=True)
            thetas.append({n: p - 0.5 * d for (n, p), d in zip(own.items(), grad)})
            total = total + L
        else:
            for theta in thetas:
                copy = {n: b.clone() for n, b in net.M.named_buffers()}
                z = look.maps[-1] if norm == "domain" else whole.maps[-1]
                logit = functional_call(net.M, (theta, copy), z)[0][-len(yk):]
                total = total + F.binary_cross_entropy_with_logits(logit, yk.float())
    total.backward()
    want = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    after = {k: v.clone() for k, v in net.state_dict().items() if "running" in k or "num_batches" in k}
    net.zero_grad()
    net.load_state_dict(start)
    loss = meta_loss(net, x, y, depth, 3, Terms(0.5, mmd=0, cut=cut, norm=norm))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, total)
    for k, p in net.named_parameters():
        torch.testing.assert_close(p.grad, want[k], rtol=2e-4, atol=2e-5, msg=k)
    for k, v in after.items():                  # statistics once, not twice
        torch.testing.assert_close(net.state_dict()[k], v, msg=k)


@pytest.mark.parametrize("norm", ["step", "domain"])
def test_without_an_inner_step_all_heads_are_one(norm):
    net, x, y, depth = batch()
    terms = Terms(0.0, mmd=0, norm=norm)
    short = meta_loss(net, x, y, depth, 3, terms)["test"]
    z = net.E(x if norm == "step" else x[-4:]).maps[-1]
    theta = dict(net.M.named_parameters())
    logit = d2am.adapted(net.M, [theta, theta], z)[0][:, -4:]
    literal = sum(F.binary_cross_entropy_with_logits(own, y[-4:].float()) for own in logit)
    torch.testing.assert_close(short, literal)


def test_second_order_and_alpha_matter():
    net, x, y, depth = batch()
    grads = []
    for alpha in (0.0, 0.5):
        out = meta_loss(net, x, y, depth, 3, Terms(alpha, mmd=0, confusion=0))
        grads.append(torch.autograd.grad(out["loss"], net.M.fc.weight)[0])
    assert (grads[0] - grads[1]).norm() > 0.05 * grads[0].norm()


def test_the_cut_holds_less():
    net, x, y, depth = batch()

    def held(cut):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            meta_loss(net, x, y, depth, 3, Terms(cut=cut))
        return sum(sizes)

    assert held(True) < 0.6 * held(False)


def test_only_the_probe_learns_to_read():
    net, x, y, _ = batch()
    look = net.E(x)
    loss = d2am.confusion_loss(net.E, look, y.float(), probe="trained")
    hide = d2am.confusion_loss(net.E, look, y.float())
    gate = net.E.drlm[0]
    ours, letter = (torch.autograd.grad(v, [gate.wp, gate.w1], retain_graph=True) for v in (loss, hide))
    torch.testing.assert_close(ours[1], letter[1])                  # E hides in the same way
    assert (ours[0] - letter[0]).abs().max() > 1e-3                 # the probe has another aim
    q = torch.linspace(0.01, 0.99, 99)
    zero = Look([], [torch.logit(q)[:, None]], [], [torch.zeros(99, 1)])
    E = torch.nn.Module()
    gate = d2am.DRLM(1, 1)
    gate.wp.data.fill_(1.0)
    E.drlm = [gate]
    losses = {e: torch.stack([d2am.confusion_loss(E, Look([], [m], [], [torch.zeros(1, 1)]), None, e)
                              for m in zero.mean[0].split(1)]) for e in ("binary", "p_log_p")}
    assert q[losses["binary"].argmin()] == pytest.approx(0.5, abs=0.011)
    assert q[losses["p_log_p"].argmin()] == pytest.approx(1 / np.e, abs=0.011)


def test_clusters_come_in_pairs_and_keep_their_names():
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    style, y = torch.arange(240) % 3, (torch.arange(240) < 120).long()
    df = 6 * F.one_hot(style, 40).float() + 25 * (1 - y)[:, None] + torch.randn(240, 40, generator=g())
    first = d2am.pseudo_domains(df, y, 3, g(1))
    assert d2am.nmi(first, style) > 0.99 and d2am.nmi(first, y) < 0.01
    again = d2am.pseudo_domains(df, y, 3, g(2), before=first)
    assert (again == first).all()
    assert d2am.nmi(d2am.pseudo_domains(df, y, 2, g(1), classes="together"), y) > 0.99
    a, b = torch.randint(4, (500,), generator=g()), torch.randint(3, (500,), generator=g())
    b = torch.where(torch.rand(500, generator=g()) < 0.5, a % 3, b)
    assert d2am.nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b))
    assert d2am.ari(a, b) == pytest.approx(adjusted_rand_score(a, b))
    one = torch.zeros(5).long()
    assert d2am.nmi(one, one) == 1 == d2am.ari(one, one)


def test_no_cluster_outgrows_its_share():
    x = torch.cat([torch.randn(70, 2, generator=g()), torch.tensor([[9.0, 0]]) + torch.randn(20, 2, generator=g())])
    label, c = d2am.balanced(x, torch.tensor([[0.0, 0], [9, 0], [0, 9]]), 1.0)
    assert torch.bincount(label).tolist() == [30, 30, 30]
    assert (label[70:] == 1).all()                          # who belongs there stays
    free = d2am.capped(torch.cdist(x, c).square(), 90)
    assert (free == torch.cdist(x, c).argmin(1)).all()
    with pytest.raises(UserError, match="3 clusters of 20 do not hold 90"):
        d2am.capped(torch.cdist(x, c), 20)
    y = (torch.arange(90) % 2).long()
    sizes = lambda capacity: torch.bincount(d2am.pseudo_domains(x, y, 3, g(), capacity=capacity)).tolist()
    assert max(sizes(1.0)) == 30 < max(sizes(0.0))


def test_what_is_not_finite_or_not_divisible_is_refused():
    y = (torch.arange(12) < 6).long()
    df = torch.randn(12, 6, generator=g())
    df[3, 2] = torch.nan
    with pytest.raises(UserError, match="1 of 12 samples"):
        d2am.pseudo_domains(df, y, 2, g())
    with pytest.raises(UserError, match="1 of 4 are not finite"):
        equal_error(np.array([.1, np.nan, .3, .9]), np.array([0, 0, 1, 1]))
    net, x, labels, depth = batch()
    with pytest.raises(UserError, match="7 samples are no 3 domains"):
        meta_loss(net, x[:7], labels[:7], depth[:7], 3, Terms())


def test_pca_and_kmeans_against_the_library():
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    x = torch.randn(300, 12, generator=g()) * torch.linspace(3, 0.1, 12)
    theirs = PCA(5).fit_transform(x.numpy())
    np.testing.assert_allclose(d2am.pca(x, 5).abs().numpy(), np.abs(theirs), atol=1e-3)
    assert d2am.pca(x[:4], 256).shape == (4, 4)
    label, c = d2am.kmeans(x, 4, g())
    cost = float((x - c[label]).square().sum())
    assert cost < 1.05 * KMeans(4, n_init=10, random_state=0).fit(x).inertia_
    with pytest.raises(UserError, match="5 clusters of 3 samples"):
        d2am.kmeans(x[:3], 5, g())


def test_batches_are_balanced_and_every_domain_is_tested_on():
    y = (torch.arange(100) % 2 == 0).long()
    domain = torch.where(torch.arange(100) < 6, 0, 1 + torch.arange(100) % 3 % 2)
    rows = d2am.epoch_rows(domain, y, 3, 5, 30, g()).view(30, 3, 10)
    assert (domain[rows] == domain[rows][:, :, :1]).all()
    assert (y[rows][:, :, :5] == 1).all() and (y[rows][:, :, 5:] == 0).all()
    assert len(domain[rows[:, 2, 0]].unique()) == 3
    mixed = d2am.epoch_rows(None, y, 3, 5, 30, g()).view(30, 3, 10)
    assert (y[mixed].float().mean(2) == 0.5).all()
    alone = d2am.epoch_rows((y == 1).long(), y, 2, 5, 4, g()).view(4, 2, 10)    # one class each
    assert ((y[alone].float().mean(2) % 1) == 0).all()


def test_threshold_is_where_the_rates_meet():
    rng = np.random.default_rng(0)
    live = rng.integers(0, 2, 101)
    p = rng.random(101) + 0.4 * live
    far, frr, hter = errors(p, live, equal_error(p, live))
    best = min(abs(np.subtract(*errors(p, live, t)[:2])) for t in np.r_[p, p + 1e-9])
    assert abs(far - frr) == pytest.approx(best)
    saturated = np.array([0.0] * 5 + [1.0] * 5)
    assert errors(saturated, saturated, equal_error(saturated, saturated))[2] == 0
    with pytest.raises(UserError, match="both live and spoof"):
        equal_error(p, np.ones(101))


# readers: small files in the released layouts
def film(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((9, 48, 64, 3), shade, np.uint8)
    frames[:, 10:30, 20:40] = 255 - shade
    write_video(path.with_suffix(".mp4"), frames)
    path.with_suffix(".mp4").rename(path)


NAMES = {
    "OULU-NPU": ["Train_files/1_1_01_1.avi", "Train_files/1_2_02_3.avi", "Dev_files/2_1_21_1.avi",
                 "Test_files/6_3_36_1.avi", "Test_files/6_3_36_5.avi"],
    "CASIA-FASD": ["train_release/1/1.avi", "train_release/1/HR_3.avi", "test_release/2/HR_1.avi",
                   "test_release/2/8.avi"],
    "Replay-Attack": ["replayattack-train/train/real/client001_session01_webcam_authenticate_adverse_1.mov",
                      "devel/real/client003_session01_webcam_authenticate_adverse_1.mov",
                      "test/attack/fixed/attack_print_client009_session01_highdef_photo_adverse.mov",
                      "test/attack/hand/attack_mobile_client009_session01_mobile_video_controlled.mov"],
    "MSU-MFSD": ["scene01/real/real_client001_android_SD_scene01.mp4",
                 "scene01/attack/attack_client001_laptop_SD_printed_photo_scene01.mp4",
                 "scene01/attack/attack_client002_android_SD_ipad_video_scene01.mov"]}


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("spoof")
    for k, (folder, names) in enumerate(NAMES.items()):
        for i, name in enumerate(names):
            film(root / folder / name, 20 * k + 10 * i)
    (root / "MSU-MFSD" / "train_sub_list.txt").write_text("01\n")
    (root / "MSU-MFSD" / "test_sub_list.txt").write_text("02\n")
    (root / "OULU-NPU" / "Test_files" / "6_3_36_2.avi").write_bytes(b"")
    (root / "CASIA-FASD" / "test_release" / "2" / "notes.avi").write_bytes(b"x")
    return root


def test_released_layouts(data_sets):
    sets = readers.read_data_sets(data_sets)
    assert set(sets) == set("OCIM")
    kinds = {k: dict(zip((p.name for p in s.paths), zip(s.attack, s.split))) for k, s in sets.items()}
    assert kinds["O"] == {"1_1_01_1.avi": (0, "train"), "1_2_02_3.avi": (1, "train"), "2_1_21_1.avi": (0, "dev"),
                          "6_3_36_1.avi": (0, "test"), "6_3_36_5.avi": (2, "test")}
    assert kinds["C"]["HR_3.avi"] == (1, "train") and kinds["C"]["8.avi"] == (2, "test")
    assert [v[0] for v in kinds["I"].values()] == [0, 0, 1, 2]
    assert [v for v in kinds["M"].values()] == [(0, "train"), (1, "train"), (2, "test")]
    assert sets["O"].problems["empty file"] and sets["C"].problems["name not understood"]
    sources, target = readers.protocol("O&C&I→M", sets)
    assert len(target) == 3 and len(sources["O"]) == 4 and len(sources["C"]) == 4      # OULU's dev is left out
    found = check_data(data_sets)
    text = str(found)
    assert found.usable and "O&C&I->M" in text and "1 × empty file" in text and "not understood" in text
    with pytest.raises(UserError, match="train_sub_list.txt: missing"):
        readers.read_msu(data_sets / "CASIA-FASD")
    with pytest.raises(UserError, match="no data set here"):
        readers.read_data_sets(data_sets / "CASIA-FASD")
    with pytest.raises(UserError, match="needs MSU-MFSD"):
        readers.protocol("O&C&I->M", {k: v for k, v in sets.items() if k != "M"})
    with pytest.raises(UserError, match="no 'O->C'"):
        readers.protocol("O->C", sets)


def test_frame_lists_and_their_labels(tmp_path):
    for name in ("CASIA/train/1/a.png", "CASIA/train/1/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / name, np.full((40, 40, 3), 90, np.uint8))
    depth = tmp_path / "CASIA" / "depth" / "train" / "1"
    depth.mkdir(parents=True)
    write_image(depth / "a_depth.jpg", np.full((64, 64), 128, np.uint8))
    lists = tmp_path / "CASIA"
    (lists / "image_list_real.txt").write_text("train/1/a.png 1\n")
    (lists / "image_list_fake.txt").write_text("train/1/b.png 0\ntrain/1/gone.png 0\n")
    s = readers.read_data_sets(tmp_path)["C"]
    assert s.attack == [0, -1] and s.depth[0].name == "a_depth.jpg" and s.problems["missing image"]
    assert abs(d2am.read_depth(s.depth[0], 12, None).mean() - 128 / 255) < 0.02
    x, rows = readers.load_pictures(s, 24)
    assert x.shape == (2, 3, 24, 24) and rows.tolist() == [0, 1] and abs(int(x[0, 0, 5, 5]) - 90) < 2
    (lists / "list.txt").write_text("train/1/a.png 0\n")
    with pytest.raises(UserError, match="which label is live"):
        readers.read_list(lists / "list.txt")
    (lists / "list.txt").write_text("# live=0\ntrain/1/a.png 0\ntrain/1/b.png 1\n")
    assert readers.read_list(lists / "list.txt").attack == [0, -1]
    (lists / "list.txt").write_text("# live=0\ntrain/1/a.png live\n")
    with pytest.raises(UserError, match="line 2: expected PATH LABEL"):
        readers.read_list(lists / "list.txt")


def test_ssdg_lists(tmp_path):
    folder, entries = tmp_path / "CASIA", []
    for video, live in (("1", 1), ("2", 0)):
        for k in range(8):
            (folder / video).mkdir(parents=True, exist_ok=True)
            write_image(folder / video / f"{k}.png", np.full((40, 40, 3), 90, np.uint8))
            entries.append({"photo_path": f"{video}/{k}.png", "photo_label": live,
                            "photo_belong_to_video_ID": int(video)})
    for name in ("train", "all", "choose_train"):
        (folder / f"{name}_label.json").write_text(json.dumps(entries))
    s = readers.read_data_sets(tmp_path)["C"]
    assert [(p.parent.name, p.name) for p in s.paths] == [("1", "6.png"), ("2", "6.png")]
    assert s.attack == [0, -1] and s.split == ["train"] * 2
    (folder / "train_label.json").write_text('[{"photo": 1}]')
    with pytest.raises(UserError, match="train_label.json: not a list of photo_path"):
        readers.read_data_sets(tmp_path)


def test_damaged_video_is_left_out_and_named(data_sets):
    s = readers.read_oulu(data_sets / "OULU-NPU").select([3, 4])
    x, rows = readers.load_pictures(s, 24, 2)
    assert x.shape == (4, 3, 24, 24) and rows.tolist() == [0, 0, 1, 1]
    bad = readers.read_casia(data_sets / "CASIA-FASD")
    bad.paths[0] = data_sets / "CASIA-FASD" / "test_release" / "2" / "notes.avi"
    x, rows = readers.load_pictures(bad, 24)
    assert 0 not in rows and "notes.avi" in bad.problems["unreadable"][0]


def test_protocol_run_on_tiny_files(data_sets, tmp_path):
    config = Config.preset("full", data_root=data_sets, out_dir=tmp_path, protocols=("O&C&I->M",), side=24, width=0.5,
                           network="small", epochs=1, epoch_steps=1, batch=1, K=1, rows=("D2AM",), precision="no",
                           workers=1)
    report = d2am.run(config)
    assert set(report.metrics) == {"D2AM"} and (tmp_path / "weights.safetensors").is_file()
    assert set(report.metrics["D2AM"]) >= {"AUC", "HTER", "AUC O&C&I->M"}
    assert not any(k.startswith("weights") for k in report.metrics["D2AM"]) and report.claim.verdict == "undecided"
    assert d2am.load_detector(tmp_path / "weights.safetensors")[1] == 48


def test_full_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="OULU-NPU, CASIA-FASD, Replay-Attack and MSU-MFSD"):
        d2am.run(Config.preset("full"))
    film(tmp_path / "CASIA-FASD" / "train_release" / "1" / "1.avi", 10)
    assert not check_data(tmp_path).usable                  # as `full` would say
    for part in ("train/live/a", "train/spoof/b", "test/live/c", "test/spoof/d"):
        film(tmp_path / "MINE" / f"{part}.avi", 10)
    assert check_data(tmp_path / "MINE", "book").usable and not check_data(tmp_path / "MINE").usable
    with pytest.raises(UserError) as error:
        d2am.run(Config.preset("full", data_root=tmp_path))
    assert "O&C&I->M: needs OULU-NPU, Replay-Attack, MSU-MFSD" in str(error.value)
    with pytest.raises(UserError, match="no 'X->Y'"):
        d2am.run(Config.preset("full", data_root=tmp_path, protocols=("X->Y",)))


# the experiment
def test_a_stopped_run_goes_on(tmp_path):
    config = Config.preset("smoke", out_dir=tmp_path, rows=tuple(ROWS), **{
        k: v for k, v in SMALL.items() if k != "n_seeds"})
    report = d2am.run(config)
    step = tmp_path / "steps" / "seed0" / f"{OURS}.npz"
    before = step.stat().st_mtime_ns
    (tmp_path / "steps" / "seed0" / "pooled.npz").unlink()
    again = d2am.run(config)
    same = lambda a, b: np.testing.assert_equal(a.metrics, b.metrics)
    same(again, report)
    assert step.stat().st_mtime_ns == before
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["chapter"] == "d2am" and saved["claim"]["verdict"] == "undecided" and saved["mechanism"]
    assert saved["roles"] == {"meta, random partition": "baseline", "ridge rule": "trivial",
                              "meta, true sites": "ceiling"}


@pytest.mark.parametrize("ours, true, verdicts", [
    ([84, 83, 84], [85, 84, 85], ("shown", "shown")), ([80.1, 80.2, 80.1], [84, 83, 84], ("refuted", "shown")),
    ([90, 70, 80], [80.1, 79.9, 80], ("undecided", "undecided"))])
def test_claim_and_control_follow_the_numbers(ours, true, verdicts):
    row = lambda auc: {"AUC": auc, "HTER": [100 - x for x in auc]}
    claim, findings = d2am.judge_claim({d2am.OURS: row(ours), d2am.TRUE: row(true), d2am.RANDOM: row([80.] * 3)})
    assert (claim.verdict, findings[0].verdict) == verdicts and findings[0].text.startswith("positive control")
    assert findings[1].lower and findings[1].verdict == verdicts[1]
    alone, none = d2am.judge_claim({d2am.OURS: row(ours)})
    assert alone.verdict == "undecided" and "not judged" in alone.text and not none


def test_training_learns():
    config = Config.preset("book", **SMALL | {"epochs": 1, "epoch_steps": 25, "live": 40})
    sets = d2am.world_sets(config, 100)
    office = sets["train"].where(sets["train"].site == 0)
    net, losses = d2am.train(config, ROWS["pooled"], office, 0)
    assert losses.shape == (1,) and 0 < losses[0] < 1
    p = d2am.predict(net, office.images)[0].numpy()
    live = office.live.numpy() == 1
    assert d2am.auc(p[live], p[~live]) > 0.75


# apply
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    write_weights(path, d2am.build(Config.preset("smoke")).state_dict() | {"threshold": torch.tensor(0.4)})
    return path


def test_apply(weights, tmp_path):
    face = (255 * render_clips(1, 1, size=200).images[0]).byte().permute(1, 2, 0).numpy()
    write_image(tmp_path / "face.png", face)
    write_image(tmp_path / "grey.png", face.mean(2).astype(np.uint8))
    write_image(tmp_path / "noise.png", np.random.default_rng(0).integers(0, 256, (70, 60, 3)).astype(np.uint8))
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    rows = d2am.apply([tmp_path, tmp_path / "gone.png"], weights, tmp_path / "out")
    by = {r["input"].split("/")[-1]: r for r in rows}
    good = by["face.png"]
    assert list(good)[0] == "input" and good["face"] == "found" and good["threshold"] == 0.4
    assert good["live"] == (good["liveness"] >= 0.4) and 0 <= good["liveness"] <= 1 and "not for use" in good["note"]
    assert np.asarray(Image.open(tmp_path / "out" / good["picture"])).shape == (216, 384, 3)
    assert by["noise.png"]["face"] == "not found" and by["grey.png"]["face"] == "found"
    assert all("liveness" not in by[k] and "live" not in by[k] and by[k]["reason"] for k in ("noise.png", "grey.png"))
    assert sum("error" in r for r in rows) == 2
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == rows
    array, = d2am.apply(face, weights)
    assert array["liveness"] == good["liveness"]


def test_portraits_can_be_tried(weights):
    paths = sorted(data_folder("portraits").glob("*.png"))[:2]
    rates = d2am.try_on([read_image(p) for p in paths], weights)
    assert set(rates) == {"refused", "passed"} and all(0 <= v <= 100 for v in rates.values())
    x, attack, face = d2am.rephotograph([read_image(p) for p in paths], world.draw_sites(2, 0), side=48)
    assert x.shape == (12, 3, 48, 48) and attack.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and face.max() == 1


def test_weights_of_another_kind(tmp_path):
    write_weights(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="not of this chapter"):
        d2am.apply([], tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        d2am.apply([], tmp_path / "gone.safetensors")


def test_settings_are_checked():
    with pytest.raises(UserError, match="no setting 'clusters'"):
        Config.preset("book", clusters=3)
    assert Config.preset("book", protocols="mixture").protocols == ("mixture",)
    assert Config.preset("book", rows="pooled,D2AM").rows == ("pooled", "D2AM")
