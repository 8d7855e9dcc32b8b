"""Exact frames from files, folders and arrays; damaged ones; sampling; the lists of the data sets."""
import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from facebook_nb.files import UserError, write_image
from facebook_nb.readers import video
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


KINDS = [(codec, b, suffix) for codec in ("libx264", "mpeg2video", "mpeg4") for b in (0, 2)
         for suffix in ("mp4", "mov", "mkv", "avi", "ts", "mpg")] + [
    ("mjpeg", 0, "avi"), ("libvpx", 0, "webm"), ("libvpx-vp9", 0, "mkv"), ("wmv2", 0, "wmv")]


def encode(path, frames, codec, b=0):
    options = {"g": "12", "bf": str(b), "x264-params": f"bframes={b}:keyint=12:open-gop=1",
               "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8", "qscale": "2"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", sorted({k[0] for k in KINDS}))
def test_frames_by_number_are_the_frames_in_order(codec, tmp_path):
    """In every container, with B-frames and without, from any place."""
    frames = bars(40)
    for _, b, suffix in (k for k in KINDS if k[0] == codec):
        try:
            clip = open_clip(encode(tmp_path / f"{b}.{suffix}", frames, codec, b))
        except (av.FFmpegError, ValueError) as error:       # this pair cannot be written here
            assert not isinstance(error, UserError), error
            continue
        every = np.concatenate(list(clip.chunks()))
        assert len(clip) == len(every) >= 38 and [number(f) for f in every[:8]] == list(range(8)), (codec, b, suffix)
        for i in (*range(10, 27), len(clip) - 1, 0):
            assert (clip.read([i])[0] == every[i]).all(), (codec, b, suffix, i)
        assert (clip.read([3, 30, 5, 3]) == every[[3, 30, 5, 3]]).all()
        assert np.abs(np.diff(clip.times) - 0.04).max() < 2e-3 or suffix == "wmv", (codec, b, suffix)


def test_no_jump_inside_a_group_of_pictures(file, monkeypatch):
    clip, jumps = open_clip(file), []
    one = clip._from
    monkeypatch.setattr(clip, "_from", lambda *a: jumps.append(a[2]) or one(*a))
    assert sorted(clip.keys)[:4] == [0, 28, 56, 84]
    clip.read([29, 40, 55, 90])
    assert jumps == [28, 84]


def turned(path, degrees):
    """The film with a display matrix, as telephones write it."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    out = path.with_name(f"{degrees}.mp4")
    out.write_bytes(data)
    return out


def test_a_film_held_upright_is_read_upright(tmp_path):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :16, :24] = 255                               # upper left
    plain = encode(tmp_path / "a.mp4", frames, "mpeg4")
    for degrees, turns in ((90, -1), (180, 2), (270, 1)):
        clip = open_clip(turned(plain, degrees))
        assert clip.size == ((48, 32) if degrees == 180 else (32, 48))
        for image in (clip.read([1])[0], next(clip.chunks())[1]):
            assert np.abs(image - np.rot90(frames[0], turns).astype(float)).mean() < 3
    assert clip.read([0, 2], (20, 10)).shape == (2, 10, 20, 3)


def test_large_frames_come_in_small_chunks(file, monkeypatch):
    monkeypatch.setattr(video, "CHUNK_BYTES", 48 * 48 * 3 * 49)
    assert [len(c) for c in open_clip(file).chunks()] == [50] * 4
    assert open_clip(file).read([4, 0], (64, 36)).shape == (2, 36, 64, 3)


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


def test_folders_numbered_by_the_clock_or_twice(tmp_path):
    for k in (2, 0, 1):
        write_image(tmp_path / f"f/{1612345678901234567 + k * 33333333}.png", np.full((8, 8, 3), k, np.uint8))
    clip = open_clip(tmp_path / "f")
    assert len(clip) == 3 and clip.read([0, 1, 2])[:, 0, 0, 0].tolist() == [0, 1, 2]
    write_image(tmp_path / "f/b_1612345678901234567.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="have one number"):
        open_clip(tmp_path / "f")


def test_arrays_of_other_types(tmp_path):
    grey = np.arange(6 * 8 * 8).reshape(6, 8, 8) % 256
    colour = np.repeat(grey[..., None], 4, 3)
    for k, x in enumerate((colour / 255, (colour / 255).astype(np.float32), colour.astype(float), colour * 257,
                           (colour * 257).astype(np.uint16), colour.astype(np.uint8), torch.from_numpy(colour))):
        np.save(tmp_path / f"{k}.npy", x)
        for clip in (open_clip(x), open_clip(tmp_path / f"{k}.npy")):
            assert (clip.read([5, 0]) == colour[[5, 0], ..., :3]).all()       # the scale is that of all frames
    assert (open_clip(grey > 9).read([0]) == 255 * (grey[:1] > 9)).all()
    for bad in (np.full((4, 2, 2), "ab"), np.zeros((3, 0, 8)), np.full((3, 4, 4), 10 ** 6), np.zeros((3, 4, 4, 5)),
                np.full((3, 4, 4), -0.5), np.full((3, 4, 4), np.nan)):
        with pytest.raises(UserError, match="array: "):
            open_clip(bad).read([0])
    write_image(tmp_path / "a.png", colour[0, ..., :3].astype(np.uint8))
    with pytest.raises(UserError, match="one picture"):
        open_clip(tmp_path / "a.png")


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
    (tmp_path / "list.txt").write_bytes("\ufeffa b 30 1\n".encode())   # as Windows saves it
    assert len(read_list(tmp_path / "list.txt", tmp_path)) == 1
    for bad in ("a 30", "a ² 0", "a 20 30000000", "../a 30 1", "/a 30 1"):
        (tmp_path / "bad.txt").write_text(f"{bad}\n")
        with pytest.raises(UserError, match="bad.txt: (line 1|.*leads out)"):
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
