"""Clips in and out: round trips, frame choice, damaged and hostile files, and pictures of clips."""

import re
import shutil
import struct
import subprocess
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageDraw

import mini_mi

FFMPEG = shutil.which("ffmpeg")
VERSION = subprocess.run([FFMPEG, "-version"], capture_output=True, text=True).stdout if FFMPEG else ""
TIMES = "-vsync" if re.search(r"^ffmpeg version n?([1-4]|5\.0)\b", VERSION) else "-fps_mode"


def clip(frames=12, height=48, width=64):
    """A square that moves over a gradient, (F,h,w,3) uint8; frames 4 and 5 are equal."""
    y, x = np.mgrid[:height, :width]
    video = np.stack([np.stack([x * 2, y * 3, (x + y)], -1)] * frames).astype(np.uint8)
    for index, frame in enumerate(video):
        left = 3 * (4 if index == 5 else index)
        frame[12:28, left : left + 16] = (250, 30, 40)
    return video


def numbered(frames, size=16):
    """(F,h,w,3) uint8 where every pixel of frame k is k."""
    return np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)


def refused(match, *args, **kwargs):
    with pytest.raises(mini_mi.UserError, match=match) as caught:
        mini_mi.read_video(*args, **kwargs)
    assert "\n" not in str(caught.value)


# ---- Round trips ---------------------------------------------------------------------------------------
def test_webp_comes_back_bit_for_bit_with_equal_neighbours(tmp_path):
    mini_mi.write_video(tmp_path / "x.webp", clip(), 8)
    assert np.array_equal(mini_mi.read_video(tmp_path / "x.webp", 12, (64, 48)), clip())
    still = np.repeat(clip(3), 4, axis=0)  # every frame four times: PIL writes three that last longer
    held = np.concatenate([still, clip(4)[3:]])
    mini_mi.write_video(tmp_path / "held.webp", held, 8)
    assert np.array_equal(mini_mi.read_video(tmp_path / "held.webp", 13, (64, 48)), held)


def test_gif_comes_back_with_all_frames_and_does_not_flicker(tmp_path):
    mini_mi.write_video(tmp_path / "x.gif", clip(), 8)
    video = mini_mi.read_video(tmp_path / "x.gif", 12, (64, 48))
    assert np.abs(video.astype(int) - clip()).mean() < 4
    assert (video[:, 40:] == video[:1, 40:]).all()  # what stands still is the same in each frame, to the bit
    assert np.array_equal(video[4], video[5]) and not np.array_equal(video[5], video[6])
    mini_mi.write_video(tmp_path / "still.gif", np.repeat(clip(1), 5, axis=0), 8)
    refused("has 1 frame, but 5", tmp_path / "still.gif", 5, (64, 48))  # nothing moves at all


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [8, 10, 23.976, 12.5])
def test_durations_add_up_and_the_clip_loops(tmp_path, suffix, fps):
    path, total = tmp_path / f"x{suffix}", 0
    mini_mi.write_video(path, clip(), fps)
    with Image.open(path) as image:
        assert image.info["loop"] == 0 and image.n_frames == 11  # of 12, two neighbours are equal
        for index in range(11):
            image.seek(index)
            image.load()
            total += image.info["duration"]
    assert abs(total - 12_000 / fps) <= (5 if suffix == ".gif" else 0.5)  # rounded once, not once per frame


def test_few_colours_survive_in_a_gif(tmp_path):
    video = np.zeros((3, 16, 16, 3), np.uint8)
    video[0, :8], video[1, :, :8], video[2] = (255, 0, 0), (0, 200, 40), (10, 20, 250)
    mini_mi.write_video(tmp_path / "x.gif", video, 5)
    assert np.abs(mini_mi.read_video(tmp_path / "x.gif", 3, (16, 16)).astype(int) - video).max() <= 4


@pytest.mark.parametrize("height, width", [(48, 64), (47, 63)])
def test_mp4_round_trip_also_of_odd_size(tmp_path, height, width):
    path, video = tmp_path / "x.mp4", clip(12, height, width)
    if FFMPEG is None:
        with pytest.raises(mini_mi.UserError, match="needs the program ffmpeg"):
            mini_mi.write_video(path, video, 8)
        assert list(tmp_path.iterdir()) == []
        return
    mini_mi.write_video(path, video, 8)
    even = (width + width % 2, height + height % 2)
    back = mini_mi.read_video(path, 12, even)
    assert np.abs(back[:, :height, :width].astype(int) - video).mean() < 6
    assert list(tmp_path.iterdir()) == [path]
    refused("has 12 frames, but 13 are needed", path, 13, even)


def test_mp4_tells_its_colours_and_they_come_back(tmp_path):
    """BT.709 with its tags, as players expect: of a film without tags they guess."""
    if FFMPEG is None:
        pytest.skip("needs ffmpeg")
    video = np.repeat(np.asarray(bar(70))[None], 4, axis=0)
    mini_mi.write_video(tmp_path / "x.mp4", video, 23.976)
    tags = "color_range,color_space,color_transfer,color_primaries,r_frame_rate,pix_fmt"
    told = subprocess.run(["ffprobe", "-v", "error", "-show_entries", f"stream={tags}",
                           "-of", "default=nk=1:nw=1", tmp_path / "x.mp4"],
                          capture_output=True, text=True, check=True).stdout.split()
    assert sorted(told[:-1]) == ["bt709", "bt709", "bt709", "tv", "yuv420p"]
    assert abs(float(Fraction(told[-1])) - 23.976) < 1e-3
    back = mini_mi.read_video(tmp_path / "x.mp4", 4, (160, 96))
    assert np.abs(corners(back[0]) - COLOURS).max() < 12 and np.abs(back.astype(int) - video).mean() < 2


def test_without_ffmpeg_a_video_file_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "x.mp4").write_bytes(b"anything")
    refused("needs the program ffmpeg", tmp_path / "x.mp4", 4, (16, 16))
    with pytest.raises(mini_mi.UserError, match="needs the program ffmpeg"):
        mini_mi.write_video(tmp_path / "y.mp4", clip(), 8)
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize("script, match", [
    ("#!/bin/sh\necho cannot open libx.so >&2\nexit 127\n", "exit status 127, cannot open libx.so.: install"),
    ("#!/bin/sh\nexit 1\n", "exit status 1, no message.: install"), ("#!/nosuch\n", "cannot be started")])
def test_a_broken_ffmpeg_is_one_clear_line(tmp_path, monkeypatch, script, match):
    (tmp_path / "ffmpeg").write_text(script)
    (tmp_path / "ffmpeg").chmod(0o755)
    (tmp_path / "x.mp4").write_bytes(b"anything")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(match, tmp_path / "x.mp4", 4, (16, 16))
    with pytest.raises(mini_mi.UserError, match=match):
        mini_mi.call_ffmpeg("-version")


def test_a_working_ffmpeg_passes_the_check():
    if FFMPEG:
        mini_mi.call_ffmpeg("-version")


def ffmpeg_make(path, *options):
    """A 20-frame test film by ffmpeg, 64x32, frame k at k/10 seconds."""
    source = "testsrc=size=64x32:rate=10:duration=2"
    subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", source, *options, str(path)], check=True)
    return path


def test_ffmpeg_reads_the_stored_frames_upright(tmp_path, monkeypatch):
    if FFMPEG is None:
        refused("No such file", tmp_path / "x.webm", 4, (16, 16))
        return
    gaps = ffmpeg_make(tmp_path / "gaps.mkv", "-vf", "select='not(between(n,5,12))'")
    refused("has 12 frames", gaps, 13, (64, 32))  # neither repeated into the gap nor dropped
    ffmpeg_make(tmp_path / "a:b.avi")
    monkeypatch.chdir(tmp_path)
    refused("has 20 frames", "a:b.avi", 21, (64, 32))  # not the protocol "a"
    plain = ffmpeg_make(tmp_path / "plain.mp4")
    copy, turned = ["-i", str(plain), "-c", "copy"], str(tmp_path / "turned.mp4")
    modern = subprocess.run([FFMPEG, "-v", "quiet", "-y", "-display_rotation", "90", *copy, turned])
    if modern.returncode:  # ffmpeg before 6 sets the mark of a turned phone otherwise
        mark = ["-metadata:s:v:0", "rotate=90"]
        subprocess.run([FFMPEG, "-v", "quiet", "-y", *copy, *mark, turned], check=True)
    upright, level = mini_mi.read_video(turned, 2, (32, 64)), mini_mi.read_video(plain, 2, (64, 32))
    errors = [np.abs(np.rot90(level, k, (1, 2)).astype(int) - upright).mean() for k in (1, 3)]
    assert min(errors) < 8 < max(errors)


@pytest.mark.parametrize("options", [(), ("-movflags", "+faststart")])
def test_truncated_or_fake_mp4_is_refused(tmp_path, options):
    """What ffmpeg says is passed on; "get it again" stands only where the end is known to be missing."""
    fake = tmp_path / "fake.avi"
    fake.write_text("this is a text\n" * 50)
    refused("says: Invalid data found when processing input; give a video" if FFMPEG else "ffmpeg",
            fake, 2, (16, 16))
    if FFMPEG:
        whole = ffmpeg_make(tmp_path / "x.mp4", *options).read_bytes()
        for share in (0.02, 0.3, 0.6, 0.9):
            fake.write_bytes(whole[: int(share * len(whole))])
            known = "; it is damaged or cut off, get it again" if options and 0.3 <= share < 0.9 else ""
            refused(f"ffmpeg says: .*{known}", fake, 2, (16, 16))
        (tmp_path / "text.mp4").write_text("this is a text\n" * 50)        # lacks moov, and never had it
        refused("ffmpeg says: .*; give a video file", tmp_path / "text.mp4", 2, (16, 16))


# ---- Which frames, and how they are scaled -------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".webp", ".gif", ""])
def test_frames_are_spaced_evenly_in_time(tmp_path, suffix):
    path, video = tmp_path / f"x{suffix}", 10 * numbered(25)
    if suffix:
        mini_mi.write_video(path, video, 10)
    else:
        path.mkdir()
        for index, frame in enumerate(video):  # natural order: 2 before 10
            Image.fromarray(frame).save(path / f"frame{index}.png")
        (path / "notes.txt").write_text("no image")
        (path / ".hidden.png").write_text("no image")

    def picked(*args, **kwargs):
        return (mini_mi.read_video(path, *args, size=(16, 16), **kwargs)[:, 0, 0, 0] / 10).round().tolist()

    assert picked(25) == list(range(25))
    assert picked(5) == [2, 7, 12, 17, 22]  # the middles of five equal parts
    assert picked(4) == [3, 9, 15, 21]
    assert picked(2) == [6, 18] and picked(1) == [12]
    refused("has 25 frames, but 26 are needed", path, 26, (16, 16))
    if not suffix:
        refused("pictures, which have no times", path, 4, (16, 16), start=1)
        return
    assert picked(5, start=0.5, duration=0.5) == [5, 6, 7, 8, 9]
    assert picked(3, start=2.2) == [22, 23, 24] and picked(2, duration=0.4) == [1, 3]
    assert picked(2, start=0.55, duration=0.1) == [5, 6]  # the frame that is shown when the part begins
    refused("has 5 frames, but 6 are needed", path, 6, (16, 16), start=0.5, duration=0.5)
    refused("it is 2.50 s long: --start 2 and", path, 2, (16, 16), start=2, duration=1)
    refused("is 2.50 s long: --start 9", path, 2, (16, 16), start=9)


def test_a_held_frame_counts_for_as_long_as_it_is_shown(tmp_path):
    """As viewers save them: one long frame instead of many equal ones."""
    images = [Image.fromarray(frame) for frame in numbered(5)]
    for name in ("x.gif", "x.webp", "x.png"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:],
                       duration=[400, 100, 100, 100, 100],
                       **(dict(lossless=True) if name == "x.webp" else {}))
        video = mini_mi.read_video(tmp_path / name, 8, (16, 16))[:, 0, 0, 0]
        assert video.tolist() == [0, 0, 0, 0, 1, 2, 3, 4], name
        assert mini_mi.read_video(tmp_path / name, 4, (16, 16))[:, 0, 0, 0].tolist() == [0, 0, 2, 4]
        refused("has 8 frames, but 9", tmp_path / name, 9, (16, 16))


def bar(position, size=(160, 96)):
    """A white bar at `position` pixels on grey, with a red, a green, a blue and a yellow corner."""
    image, (w, h) = Image.new("RGB", size, (60, 60, 60)), size
    draw = ImageDraw.Draw(image)
    for corner, colour in (((0, 0), "#f00"), ((w - 20, 0), "#0f0"),
                           ((0, h - 20), "#00f"), ((w - 20, h - 20), "#ff0")):
        draw.rectangle((*corner, corner[0] + 19, corner[1] + 19), colour)
    draw.rectangle((position, h // 2 - 8, position + 11, h // 2 + 8), "white")
    return image


def bar_positions(video):
    """Left edge of the bar in each frame (F,h,w,3)."""
    rows = video[:, video.shape[1] // 2].astype(int).sum(-1) > 500
    return [int(np.flatnonzero(row)[0]) for row in rows]


def corners(frame):
    """The four corners, (4,3): they should be red, green, blue, yellow."""
    return frame[[4, 4, -5, -5], [4, -5, 4, -5]].astype(int)


COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)])


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """film(name, positions, *options, durations=None): a video of bars by ffmpeg, 10 frames a second
    or as long as said, in a folder of its own."""
    if FFMPEG is None:
        pytest.skip("needs ffmpeg")
    pictures = tmp_path_factory.mktemp("pictures")

    def make(name, positions, *options, durations=None, picture=bar):
        folder, lines = tmp_path_factory.mktemp("film"), []
        for n, position in enumerate(positions):
            file = (pictures if picture is bar else folder) / f"{position}.png"
            if not file.exists():
                picture(position).save(file)
            lines.append(f"file '{file}'\nduration {durations[n] if durations else 0.1}\n")
        # The list's last entry gets no duration of its own unless another one follows.
        (folder / "list.txt").write_text("".join(lines))
        rate, clock = ([], [TIMES, "vfr"]) if durations else (["-r", "10"], [])
        subprocess.run([FFMPEG, "-v", "error", "-y", *rate, "-f", "concat", "-safe", "0",
                        "-i", str(folder / "list.txt"), *clock, *map(str, options), str(folder / name)],
                       check=True)
        return folder / name
    return make


H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 8)


def test_a_variable_rate_is_read_by_its_timestamps(film):
    """Ten quick frames in one second, then ten slow ones in four: frames are taken by the clock."""
    path = film("vfr.mp4", range(0, 140, 7), *H264, durations=[0.12] * 10 + [0.4] * 10)
    assert [round(p / 7) for p in bar_positions(
        mini_mi.read_video(path, 5, (160, 96), 0, 4.8))] == [4, 10, 13, 15, 17]
    assert [round(p / 7) for p in bar_positions(
        mini_mi.read_video(path, 5, (160, 96), 0, 1.2))] == [1, 3, 5, 7, 9]
    assert [round(p / 7) for p in bar_positions(mini_mi.read_video(path, 2, (160, 96), 1.2, 1.6))] == [11, 13]


@pytest.mark.parametrize("name, options", [
    ("x.mp4", (*H264, "-bf", 3, "-g", 8)), ("x.mkv", (*H264, "-bf", 2, "-g", 8)),
    ("x.ts", (*H264, "-bf", 2, "-g", 8)),
    ("x.avi", ("-c:v", "mpeg4", "-q:v", 2)), ("x.webm", ("-c:v", "libvpx", "-b:v", "2M"))])
def test_a_part_of_a_film_is_the_same_frames_in_every_container(film, name, options):
    """Reordered frames, key frames in between, times that begin anywhere."""
    path = film(name, range(0, 120, 4), *options)  # three seconds
    whole = mini_mi.read_video(path, 30, (160, 96))
    assert [round(p / 4) for p in bar_positions(whole)] == list(range(30))
    part = mini_mi.read_video(path, 10, (160, 96), start=1.5, duration=1.0)
    assert [round(p / 4) for p in bar_positions(part)] == list(range(15, 25))
    assert np.abs(corners(part[0]) - COLOURS).max() < 25
    assert [round(p / 4) for p in bar_positions(
        mini_mi.read_video(path, 4, (160, 96), start=2.6))] == [26, 27, 28, 29]
    refused("has 9 frames, but 11 are needed", path, 11, (160, 96), start=1.5, duration=0.9)
    refused("s long: --start 2.5", path, 4, (160, 96), start=2.5, duration=2)
    refused("no frames after second 9", path, 4, (160, 96), start=9)


def joined(film):
    """Segments joined by cat, as from HLS: the times begin anew in the middle."""
    halves = [film("x.ts", range(n, n + 60, 3), *H264, "-bf", 0) for n in (0, 60)]
    path = halves[0].with_name("joined.ts")
    path.write_bytes(b"".join(half.read_bytes() for half in halves))
    return path


def of_two_sizes(film):
    """A size that changes in the middle, as browsers record it."""
    halves = [film("x.h264", range(n, n + 60, 3), *H264, "-bf", 0, "-vf", f"scale={size}:flags=neighbor")
              for n, size in ((0, "160:96"), (60, "240:144"))]
    stream, path = halves[0].with_name("both.h264"), halves[0].with_name("both.mkv")
    stream.write_bytes(b"".join(half.read_bytes() for half in halves))
    subprocess.run([FFMPEG, "-v", "error", "-r", "10", "-i", stream, "-c", "copy", path], check=True)
    return path


def of_equal_stamps(film):
    """Two frames of one time stamp, twice, as recorders write them."""
    return film("x.webm", range(0, 120, 3), "-vf", "settb=1/1000,setpts='(N-eq(N,9)-eq(N,25))*100'",
                "-enc_time_base", "1/1000", TIMES, "passthrough",
                "-c:v", "libvpx", "-b:v", "2M", "-auto-alt-ref", 0)


def raw_stream(film):
    """A camera's: it has no times at all."""
    return film("x.h264", range(0, 120, 3), *H264, "-bf", 2)


@pytest.mark.parametrize("make", [joined, of_two_sizes, of_equal_stamps, raw_stream])
def test_the_bar_moves_evenly_in_films_as_recorders_write_them(film, capsys, make):
    path = make(film)
    for frames, places in ((40, range(40)), (20, range(1, 40, 2)), (10, range(2, 40, 4))):
        video = mini_mi.read_video(path, frames, (160, 96))
        assert [round(p / 3) for p in bar_positions(video)] == [*places]
    assert "dts" not in capsys.readouterr().out                    # what ffmpeg says of its own output
    assert np.abs(corners(video[0]) - COLOURS).max() < 25 and np.abs(corners(video[-1]) - COLOURS).max() < 25
    refused("has 40 frames, but 41 are needed", path, 41, (160, 96))


def test_hundreds_of_frames_are_read(film):
    path = film("x.mp4", range(130), *H264)
    assert bar_positions(mini_mi.read_video(path, 130, (160, 96))) == [*range(130)]


def test_a_part_of_a_long_film_is_kept_without_the_rest(film, monkeypatch):
    """Also of a raw stream, which has no times of its own."""
    path, kept, real = film("x.mp4", range(0, 120, 2), *H264, "-g", 4, durations=[0.3] * 60), [], mini_mi.evenly
    monkeypatch.setattr(mini_mi, "evenly", lambda times, *part: kept.append(len(times)) or real(times, *part))
    video = mini_mi.read_video(path, 4, (160, 96), start=15, duration=1.2)
    assert [round(p / 2) for p in bar_positions(video)] == [50, 51, 52, 53]
    assert 4 <= kept[0] <= 13                                     # of 60: the part, and a second on either side
    raw = film("x.h264", range(0, 120), *H264, "-r", 5, durations=[0.2] * 120)
    video = mini_mi.read_video(raw, 4, (160, 96), start=20, duration=0.8)
    assert bar_positions(video) == [100, 101, 102, 103]


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_becomes_sdr_or_is_refused_with_the_command(film, tmp_path, transfer):
    """Red comes back as red and grey as grey: not washed out."""
    filters = subprocess.run([FFMPEG, "-hide_banner", "-filters"], capture_output=True, text=True).stdout
    codecs = subprocess.run([FFMPEG, "-hide_banner", "-encoders"], capture_output=True, text=True).stdout
    if "zscale" not in filters or "libx265" not in codecs:
        pytest.skip("this ffmpeg makes no HDR")
    convert = ("format=gbrp,zscale=tin=bt709:min=gbr:pin=bt709:rin=full:t=linear:npl=203:p=bt709:m=gbr,"
               "format=gbrpf32le,"
               f"zscale=p=bt2020:t={transfer}:m=bt2020nc:r=limited:npl=203,format=yuv420p10le")
    path = film("hdr.mp4", range(0, 60, 10), "-vf", convert, "-c:v", "libx265",
                "-x265-params", "log-level=none",
                "-crf", 8, "-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc")
    video = mini_mi.read_video(path, 6, (160, 96))
    assert np.abs(corners(video[0]) - COLOURS).max() < 45 and bar_positions(video)[0] < 4
    assert np.abs(video[0, 20, 80].astype(int) - 60).max() < 15
    lame = tmp_path / "ffmpeg"                                                   # an ffmpeg without zimg
    lame.write_text(f'#!/bin/sh\n{FFMPEG} "$@" 2>&1 >/dev/null | sed s/--enable-libzimg// >&2\n')
    lame.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{mini_mi.os.environ['PATH']}")
        refused("is HDR video.*ffmpeg -i .*zscale=.* sdr.mp4", path, 6, (160, 96))


def test_transparent_video_and_gif_lie_on_white(film, tmp_path):
    """Where nothing was painted, both are white, whatever colour hides there."""
    def drawn(position):
        image = Image.new("RGBA", (160, 96), (255, 0, 255, 0))
        ImageDraw.Draw(image).rectangle((position, 30, position + 39, 60), (0, 0, 200, 255))
        return image

    films = [film("x.mov", range(0, 80, 20), "-c:v", "qtrle", "-pix_fmt", "argb", picture=drawn)]
    encoders = subprocess.run([FFMPEG, "-hide_banner", "-encoders"], capture_output=True, text=True).stdout
    if "libvpx-vp9" in encoders:
        films.append(film("x.webm", range(0, 80, 20), "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p",
                          picture=drawn))
    images = [drawn(n) for n in range(0, 80, 20)]
    images[0].save(tmp_path / "x.gif", save_all=True, append_images=images[1:], duration=100, disposal=2)
    for path in (*films, tmp_path / "x.gif"):
        video = mini_mi.read_video(path, 4, (160, 96)).astype(int)
        assert video[:, 5:20, 5:150].min() > 245, path
        assert np.abs(video[0, 45, 20] - (0, 0, 200)).max() < 30, path


def test_the_content_decides_and_not_the_suffix(film, tmp_path):
    path = shutil.copy(film("x.mp4", range(0, 60, 10), *H264), tmp_path / "really.gif")
    assert [round(p / 10) for p in bar_positions(mini_mi.read_video(path, 6, (160, 96)))] == list(range(6))
    mini_mi.write_video(tmp_path / "y.webp", numbered(4), 8)
    shutil.move(tmp_path / "y.webp", tmp_path / "y.mp4")
    assert mini_mi.read_video(tmp_path / "y.mp4", 4, (16, 16))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


# ---- Colours that are not 8-bit RGB --------------------------------------------------------------------
@pytest.mark.parametrize("name", ["x.png", "x.tif", "a/0.png", "a/0.tif"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    """Not clipped to white."""
    grey = (np.arange(256, dtype=np.uint16).reshape(16, 16)) * 257
    (tmp_path / "a").mkdir()
    Image.fromarray(grey).save(tmp_path / name)
    path = tmp_path / name if name[0] == "x" else tmp_path / "a"
    video = mini_mi.read_video(path, 1, (16, 16))[0]
    assert (video == (grey // 257)[..., None]).all()


def test_16_bit_animation_is_scaled(tmp_path):
    """An APNG of 16-bit grey."""
    if FFMPEG is None:
        pytest.skip("needs ffmpeg")
    path = tmp_path / "x.apng"
    subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", "color=gray:size=16x16:rate=10:duration=0.3",
                    "-vf", "format=gray16be,geq=lum='257*(40+60*N)'", "-pix_fmt", "gray16be",
                    "-f", "apng", str(path)],
                   check=True)
    assert mini_mi.read_video(path, 3, (16, 16))[:, 8, 8].tolist() == [[v] * 3 for v in (40, 100, 160)]


def test_float_pictures_have_white_at_1_or_are_refused(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    video = mini_mi.read_video(tmp_path / "x.tif", 1, (16, 16))[0]
    assert (video == np.arange(256).reshape(16, 16, 1)).all()
    for bad in (ramp * 255, ramp - 0.5, ramp * np.float32("nan")):
        Image.fromarray(bad).save(tmp_path / "x.tif")
        refused("x.tif: grey values from .* 0 to 1 can be read", tmp_path / "x.tif", 1, (16, 16))
    Image.fromarray((ramp * 2**31).astype(np.int32)).save(tmp_path / "x.tif")
    refused("x.tif: grey values", tmp_path / "x.tif", 1, (16, 16))


def test_cmyk_is_read(tmp_path):
    bar(40).convert("CMYK").save(tmp_path / "x.jpg", quality=98)
    frame = mini_mi.read_video(tmp_path / "x.jpg", 1, (160, 96))[0]
    assert np.abs(corners(frame) - COLOURS).max() < 12


def test_pictures_and_masks_are_not_mixed(tmp_path):
    for n in range(6):
        bar(10 * n).save(tmp_path / f"{n:05d}.jpg")
    assert len(mini_mi.read_video(tmp_path, 6, (160, 96))) == 6
    Image.new("L", (160, 96)).save(tmp_path / "00003.png")
    refused("two pictures of one number: put masks into a folder", tmp_path, 6, (160, 96))


@pytest.mark.parametrize("names", [
    ["0", "0.25", "0.5", "1", "1.25", "2", "10"], ["shot1a", "shot1b", "shot2", "shot10"],
    ["first", "last", "next"], ["Frame 9", "frame 10", "Frame 11"], ["clip.1", "clip.2", "clip.10"],
    ["1403636579763555584", "1403636579763555585", "1403636579763555586"]])
def test_pictures_come_in_the_order_of_the_numbers_in_their_names(tmp_path, names):
    for n, name in reversed([*enumerate(names)]):
        Image.new("L", (16, 16), 20 * n).save(tmp_path / f"{name}.png")
    video = mini_mi.read_video(tmp_path, len(names), (16, 16))
    assert video[:, 0, 0, 0].tolist() == [20 * n for n in range(len(names))]


def test_frames_cover_the_size_and_are_cropped_to_the_centre(tmp_path):
    wide = np.zeros((2, 40, 120, 3), np.uint8)
    wide[1, :, :40] = 99  # frames that are equal would be one
    wide[:, :, 40:80] = 255  # the middle third is white: a square crop shows only that
    mini_mi.write_video(tmp_path / "wide.webp", wide, 8)
    assert (mini_mi.read_video(tmp_path / "wide.webp", 2, (40, 40)) == 255).all()
    assert mini_mi.read_video(tmp_path / "wide.webp", 2, (20, 60)).shape == (2, 60, 20, 3)
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # finer than the small picture can show: antialiasing makes an even grey
    mini_mi.write_video(tmp_path / "stripes.webp", stripes, 8)
    small = mini_mi.read_video(tmp_path / "stripes.webp", 1, (16, 16)).astype(int)
    assert np.abs(small - 127).max() < 12


@pytest.mark.parametrize("stored, size, told", [
    ((180, 320), (64, 64), "takes away 44% of the height: --size 48x88 keeps it"),
    ((320, 180), (64, 64), "takes away 44% of the width: --size 88x48 keeps it"),
    ((1080, 1920), (576, 320), "takes away 69% of the height: --size 320x576 keeps it"),
    ((1920, 1080), (576, 320), None), ((96, 80), (64, 64), None)])
def test_a_crop_that_takes_much_away_is_told_once(tmp_path, capsys, stored, size, told):
    for n in range(3):
        Image.new("L", stored, n).save(tmp_path / f"{n}.png")
    mini_mi.check_crop.cache_clear()
    mini_mi.read_video(tmp_path, 3, size)
    assert capsys.readouterr().out == (f"note: the crop {told}\n" if told else "")


def test_a_crop_is_told_of_films_and_turned_pictures(film, tmp_path, capsys):
    """As they are shown: with square pixels, and upright."""
    mini_mi.check_crop.cache_clear()
    mini_mi.read_video(film("x.mp4", range(0, 40, 10), *H264, "-vf", "setsar=2"), 4, (96, 32))
    assert capsys.readouterr().out == ""                                  # 320 x 96 pixels
    lying = Image.new("L", (96, 32))
    lying.getexif()[0x0112] = 6
    lying.save(tmp_path / "x.jpg", exif=lying.getexif())
    mini_mi.read_video(tmp_path / "x.jpg", 1, (96, 32))
    assert "89% of the height: --size 32x96 keeps it" in capsys.readouterr().out


def test_gif_frames_are_composited(tmp_path):
    """Frame 1 paints the left half over frame 0: the right half stays red or, disposed of, is empty."""
    base = Image.new("RGBA", (16, 16), "red")
    ImageDraw.Draw(base).rectangle((0, 0, 15, 3), (0, 0, 0, 0))
    patch = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    ImageDraw.Draw(patch).rectangle((0, 6, 7, 15), "blue")
    base.save(tmp_path / "keep.gif", save_all=True, append_images=[patch], disposal=1, duration=100)
    video = mini_mi.read_video(tmp_path / "keep.gif", 2, (16, 16))
    assert video[1, 8, 2].tolist() == [0, 0, 255] and video[1, 8, 12].tolist() == [255, 0, 0]
    base.save(tmp_path / "clear.gif", save_all=True, append_images=[patch], disposal=2, duration=100)
    video = mini_mi.read_video(tmp_path / "clear.gif", 2, (16, 16))
    assert video[1, 8, 2].tolist() == [0, 0, 255] and video[1, 8, 12].tolist() == [255, 255, 255]
    assert video[0, 8, 12].tolist() == [255, 0, 0] and (video[:, 1] == 255).all()


def test_apng_with_and_without_a_separate_still(tmp_path):
    images = [Image.fromarray(frame) for frame in numbered(4)]
    images[0].save(tmp_path / "x.png", save_all=True, append_images=images[1:], duration=100)
    assert mini_mi.read_video(tmp_path / "x.png", 4, (16, 16))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    images[0].save(tmp_path / "y.apng", "PNG", save_all=True, append_images=images[1:], default_image=True)
    assert mini_mi.read_video(tmp_path / "y.apng", 3, (16, 16))[:, 0, 0, 0].tolist() == [1, 2, 3]


# ---- Bad input -----------------------------------------------------------------------------------------
def test_missing_empty_and_fake_files(tmp_path):
    refused("No such file", tmp_path / "x.gif", 2, (16, 16))
    for name, content in (("empty.gif", b""), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        refused("is empty", tmp_path / name, 2, (16, 16))
    for suffix, start in ((".gif", "GIF89a"), (".png", "\x89PNG"), (".mp4", "GIF89a")):
        (tmp_path / f"text{suffix}").write_bytes(f"{start}, but only in words\n".encode("latin-1"))
        refused("damaged, truncated or no picture", tmp_path / f"text{suffix}", 2, (16, 16))
    (tmp_path / "pointer.mp4").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused("git-lfs pointer", tmp_path / "pointer.mp4", 2, (16, 16))


def test_addresses_and_home_folders(tmp_path, monkeypatch):
    refused("web address: download the video first", "https://example.org/clip.mp4?x=1", 2, (16, 16))
    monkeypatch.setenv("HOME", str(tmp_path))
    mini_mi.write_video(tmp_path / "x.webp", numbered(3), 8)
    assert len(mini_mi.read_video("~/x.webp", 3, (16, 16))) == 3
    refused("~/y.webp cannot be read .No such file", "~/y.webp", 3, (16, 16))


def test_a_program_in_the_clothes_of_a_picture_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("PostScript was run"))
    (tmp_path / "x.gif").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n")
    refused("ffmpeg says" if FFMPEG else "needs the program", tmp_path / "x.gif", 1, (16, 16))
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x.gif").rename(folder / "x.png")
    refused("no picture", folder, 1, (16, 16))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_truncated_pictures_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".png":
        images = [Image.fromarray(frame) for frame in clip()]
        images[0].save(path, save_all=True, append_images=images[1:])
    else:
        mini_mi.write_video(path, clip(), 8)
    whole = path.read_bytes()
    for share in (0.001, 0.1, 0.37, 0.5, 0.73, 0.95):
        path.write_bytes(whole[: int(share * len(whole)) + 1])
        refused("damaged|empty|needs the program|ffmpeg says", path, 2, (16, 16))


def test_decompression_bomb_is_refused(tmp_path, side=20_000):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    refused("decompression bomb", tmp_path / "bomb.png", 1, (16, 16))
    refused("decompression bomb", tmp_path, 1, (16, 16))  # as one image of a folder


def test_pictures_of_several_pages_show_their_first(tmp_path):
    """TIFFs of microscopes, and JPEGs of cameras with a preview behind the picture."""
    for n in range(3):
        pages = [Image.new("L", (32, 32), 60 * n), *[Image.new("L", (32, 32), 255)] * 2]
        pages[0].save(tmp_path / f"{n}.tif", save_all=True, append_images=pages[1:])
    assert mini_mi.read_video(tmp_path, 3, (32, 32))[:, 0, 0, 0].tolist() == [0, 60, 120]


def test_folders_that_cannot_be_clips(tmp_path):
    refused("no picture lies directly in it: .png, .*can be read", tmp_path, 2, (16, 16))
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    Image.new("RGB", (32, 24)).save(tmp_path / "2.png")
    refused("mixes frames", tmp_path, 2, (16, 16))
    (tmp_path / "2.png").write_text("no image")
    refused("2.png is damaged", tmp_path, 2, (16, 16))


def test_tiny_images_are_refused(tmp_path):
    for size in ((1, 1), (64, 7)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        refused("8 x 8 are the least", tmp_path / "x.png", 1, (16, 16))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert mini_mi.read_video(tmp_path / "x.png", 1, (16, 16)).shape == (1, 16, 16, 3)


def test_films_of_a_few_pixels_are_refused(film):
    path = film("x.avi", range(4), "-c:v", "ffv1", picture=lambda n: Image.new("RGB", (16, 6), (n, 0, 0)))
    refused(r"frames of \(16, 6\) pixels: 8 x 8 are the least", path, 2, (16, 16))


def test_unknown_suffix_and_unwritable_place_leave_nothing_behind(tmp_path):
    (tmp_path / "file").touch()
    for path, match in (("x.mov3", "should end in"), ("x", "should end in"), ("file/x.gif", "cannot write")):
        with pytest.raises(mini_mi.UserError, match=match):
            mini_mi.write_video(tmp_path / path, clip(), 8)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- Pictures ------------------------------------------------------------------------------------------
def dark_pixels(array):
    return int((np.asarray(array).astype(int).sum(-1) < 200).sum())


def test_contact_sheet_shows_first_and_last_frame_enlarged():
    video = np.full((16, 64, 64, 3), 255, np.uint8)
    video[0], video[-1] = (255, 0, 0), (0, 0, 255)
    rows = [("reference", video), ("a star " * 60, video[:5]), ("", video)]
    sheet = np.asarray(mini_mi.contact_sheet(rows))
    row, tile = 24 + 198, 198  # 64 pixels are tripled; 6 are white
    assert sheet.shape == (3 * row, 8 * tile, 3)
    assert sheet[80, 60].tolist() == [255, 0, 0] and sheet[80, 7 * tile + 60].tolist() == [0, 0, 255]
    assert sheet[row + 80, 6 * tile].tolist() == [255, 255, 255]  # the short row ends in white
    assert 50 < dark_pixels(sheet[:24]) < dark_pixels(sheet[row : row + 24])  # the labels
    assert dark_pixels(sheet[2 * row : 2 * row + 24]) == 0
    large = np.zeros((24, 320, 576, 3), np.uint8)
    assert mini_mi.contact_sheet([("large frames are reduced", large)]).size == (8 * tile, 24 + 107 + 6)
    assert mini_mi.contact_sheet([("flat", np.zeros((2, 8, 4096, 3), np.uint8))]).size == (8 * tile, 24 + 1 + 6)


def test_side_by_side_keeps_frames_and_can_be_written(tmp_path):
    labels = ["reference", "a star " * 20, "no motion"]
    frames = mini_mi.side_by_side([clip(5), clip(5)[::-1], clip(5)], labels)
    assert frames.dtype == np.uint8 and frames.shape == (5, 60 + 3 * 48, 3 * (3 * 64 + 6), 3)
    assert all(dark_pixels(frames[0, :60, k * 198 : (k + 1) * 198]) > 30 for k in range(3))
    assert np.array_equal(frames[0, 60:, :192], frames[4, 60:, 198:390])  # the second runs backwards
    mini_mi.write_video(tmp_path / "x.gif", frames, 8)
    large = np.zeros((2, 320, 576, 3), np.uint8)
    assert mini_mi.side_by_side([large], ["large"]).shape == (2, 380, 582, 3)  # not enlarged
