"""Exact frames from files, folders and arrays; damaged ones; sampling; the lists of the data sets."""
import json

import numpy as np
import pytest

from facebook_nb.files import UserError, write_image
from facebook_nb.readers.video import (
    clip_indices,
    dense_indices,
    open_clip,
    read_kinetics,
    read_list,
    read_something,
    resample_indices,
    resize,
    segment_indices,
)
from facebook_nb.worlds.motion import write_video


def bars(n: int, side: int = 48) -> np.ndarray:
    """Frame i has its number in eight bars, black or white: it survives any codec."""
    frames = np.zeros((n, side, side, 3), np.uint8)
    for i in range(n):
        for bit in range(8):
            frames[i, :, bit * side // 8 : (bit + 1) * side // 8] = 255 * (i >> bit & 1)
    return frames


def number(image: np.ndarray) -> int:
    side = image.shape[1]
    return sum((image[:, bit * side // 8 + 2 : (bit + 1) * side // 8 - 2].mean() > 127) << bit for bit in range(8))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path, bars(200), fps=30)
    return path


def test_any_frames_in_any_order(file):
    clip = open_clip(file)
    wanted = [150, 3, 3, 199, 0, 77, 78, 120, 149]
    assert [number(f) for f in clip.read(wanted)] == wanted
    assert len(clip) == 200 and clip.fps == pytest.approx(30, rel=1e-3) and not clip.variable and clip.size == (48, 48)
    assert clip.times[60] == pytest.approx(2.0, abs=1e-3)
    assert [number(f) for part in clip.chunks(64) for f in part] == list(range(200))
    for bad in ([200], [-1]):
        with pytest.raises(UserError, match="no frame"):
            clip.read(bad)
    with pytest.raises(UserError, match="no frames were asked"):
        clip.read([])


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).choice([0.02, 0.05, 0.2], 60))
    write_video(tmp_path / "v.mp4", bars(60), times=times)
    clip = open_clip(tmp_path / "v.mp4")
    assert clip.variable and len(clip) == 60
    assert np.abs(clip.times - (times - times[0])).max() < 1e-3
    assert [number(f) for f in clip.read([59, 7, 31])] == [59, 7, 31]


def test_zero_length_missing_and_foreign_files(tmp_path):
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video at all" * 50)
    for name, message in [("zero.mp4", "empty"), ("text.mp4", "not readable as video"), ("gone.mp4", "no such")]:
        with pytest.raises(UserError, match=message) as caught:
            open_clip(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_mp4_is_refused(file, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(file.read_bytes()[:-3000])     # its index stood at the end
    with pytest.raises(UserError, match="cut.mp4: not readable as video"):
        open_clip(tmp_path / "cut.mp4")


def test_truncated_mkv_gives_what_is_there(tmp_path):
    write_video(tmp_path / "a.mkv", bars(200), fps=30)
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 6 // 10])
    clip = open_clip(tmp_path / "cut.mkv")
    assert 20 < len(clip) < 190
    whole = [number(f) for part in clip.chunks() for f in part]
    # a cut may fall between a frame and those before it that are stored later: only the last three can have a gap
    assert whole[:-3] == list(range(len(whole) - 3)) and whole == sorted(set(whole)) and len(whole) >= len(clip) - 8
    assert number(clip.read([10])[0]) == 10


def test_damage_in_the_middle_names_the_frame(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 48, 48, 3), np.uint8)
    write_video(tmp_path / "a.mp4", noise, fps=30)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle, end = data.find(b"mdat") + 4, data.find(b"moov")
    middle, length = (middle + end) // 2, (end - middle) // 4
    data[middle : middle + length] = bytes(length)
    (tmp_path / "hole.mp4").write_bytes(data)
    clip = open_clip(tmp_path / "hole.mp4")
    good, bad = 0, 0
    for i in range(0, 200, 11):
        try:
            clip.read([i])
            good += 1
        except UserError as error:
            assert f"frame {i} of 200" in str(error)
            bad += 1
    assert good + bad == 19 and good > 5


def test_frame_folders_and_arrays(tmp_path):
    frames = bars(12)
    for pattern in ("{:05d}.jpg", "img_{:05d}.jpg", "{:06d}.png"):
        folder = tmp_path / pattern[:4].strip("{:")
        for i, image in enumerate(frames, 1):
            write_image(folder / pattern.format(i), image)
        clip = open_clip(folder)
        assert len(clip) == 12 and [number(f) for f in clip.read([11, 0, 5])] == [11, 0, 5]
    (folder / "000004.png").unlink()
    with pytest.raises(UserError, match="frame number 4 is missing"):
        open_clip(folder).read([3])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no numbered frames"):
        open_clip(tmp_path / "none")
    np.save(tmp_path / "a.npy", frames)
    clip = open_clip(tmp_path / "a.npy", fps=10)
    assert (clip.read([7, 2]) == frames[[7, 2]]).all() and clip.times[5] == 0.5
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    with pytest.raises(UserError, match="cut.npy"):
        open_clip(tmp_path / "cut.npy")
    np.save(tmp_path / "flat.npy", np.zeros(5))
    with pytest.raises(UserError, match="shape"):
        open_clip(tmp_path / "flat.npy")


def test_sampling_stays_inside():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 8, 9, 100):
        for T in (1, 8):
            for index in (segment_indices(n, T), segment_indices(n, T, rng), dense_indices(n, T, 8)[0],
                          dense_indices(n, T, 8, rng)[0]):
                assert index.shape == (T,) and index.min() >= 0 and index.max() < n
    assert (clip_indices(50, 8, 3) == clip_indices(50, 8, 3)).all()   # multi-clip tests repeat
    assert (clip_indices(50, 8, 3)[0] == segment_indices(50, 8)).all()
    assert resample_indices(30, 30, 10).tolist() == list(range(2, 30, 3))
    assert len(resample_indices(250, 25, 10)) == 100
    with pytest.raises(UserError):
        segment_indices(0, 8)


def test_resize():
    assert resize(bars(2), 17, 31).shape == (2, 31, 17, 3)
    assert number(resize(bars(200)[170:171], 96, 40)[0]) == 170


def test_list_file(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "list.txt").write_text("a b 30 1\nc 2 0\ngone 12 3\n")
    found = read_list(tmp_path / "list.txt", tmp_path)
    assert [p.name for p in found.paths] == ["a b"] and found.labels.tolist() == [1] and found.frames.tolist() == [30]
    assert [p.name for p in found.missing] == ["gone"]                # and the one of 2 frames is left out
    (tmp_path / "bad.txt").write_text("a 30\n")
    with pytest.raises(UserError, match="line 1"):
        read_list(tmp_path / "bad.txt", tmp_path)


def test_something_v1_and_v2(tmp_path):
    one, two = tmp_path / "v1", tmp_path / "v2"
    for root in (one, two):
        root.mkdir()
    (one / "something-something-v1-labels.csv").write_text("Zipping up\nApproaching something\n")
    (one / "something-something-v1-validation.csv").write_text("12;Zipping up\n13;Approaching something\n")
    (one / "20bn-something-something-v1" / "12").mkdir(parents=True)
    found = read_something(one, "validation")
    assert found.classes == ["Approaching something", "Zipping up"] and found.labels.tolist() == [1]
    assert len(found.missing) == 1
    base = two / "something-something-v2"
    (two / f"{base.name}-labels.json").write_text(json.dumps({"Holding something": "0", "Moving something up": "1"}))
    rows = [{"id": "5", "label": "moving pen up", "template": "Moving [something] up", "placeholders": ["pen"]}]
    (two / f"{base.name}-train.json").write_text(json.dumps(rows))
    (two / "20bn-something-something-v2").mkdir()
    write_video(two / "20bn-something-something-v2" / "5.mp4", bars(4))
    (two / "20bn-something-something-v2" / "5.mp4").rename(two / "20bn-something-something-v2" / "5.webm")
    found = read_something(two, "train")
    assert found.labels.tolist() == [1] and found.paths[0].name == "5.webm" and len(open_clip(found.paths[0])) == 4
    rows[0]["template"] = "Flying"
    (two / f"{base.name}-train.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="Flying"):
        read_something(two, "train")


def test_kinetics(tmp_path):
    (tmp_path / "val.csv").write_text("label,youtube_id,time_start,time_end,split\n"
                                      "water sliding,28EtkKMIWq0,18,28,val\nabseiling,xx,1,11,val\n")
    (tmp_path / "val" / "water_sliding").mkdir(parents=True)
    (tmp_path / "val" / "water_sliding" / "28EtkKMIWq0_000018_000028.mp4").touch()
    found = read_kinetics(tmp_path, "val")
    assert found.classes == ["abseiling", "water sliding"] and found.labels.tolist() == [1] and len(found.missing) == 1
    (tmp_path / "val.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns"):
        read_kinetics(tmp_path, "val")
