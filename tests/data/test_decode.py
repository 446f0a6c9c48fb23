"""Frames by number: exact, and the same from both decoders, on the kinds of files there are."""
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_ssm.data import decode
from timm_ssm.data.decode import DECODERS, ClipError, FrameFolder, Video, load_index, scan, why_unavailable

from .videos import numbered_frame, packets, read_numbers, write_video

B_FRAMES = dict(bf='3', g='12')
MILLISECONDS = np.random.default_rng(0).integers(10, 90, 40).cumsum().tolist()


def truncated(path, position):
    Path(path).write_bytes(Path(path).read_bytes()[:position])
    return path


def without_last_packet(folder, name, **kwargs):
    path = write_video(folder / name, options=B_FRAMES, **kwargs)
    return truncated(path, packets(path)[-1][0])


def in_last_packet(folder, name, **kwargs):
    path = write_video(folder / name, options=B_FRAMES, **kwargs)
    position, size = packets(path)[-1]
    return truncated(path, position + size // 2)


# name: (how to make it, frames, (height, width) shown)
FASTSTART = dict(muxer_options=dict(movflags='faststart'))
CASES = {
    'b_frames': (lambda d: write_video(d / 'a.mp4', options=B_FRAMES), 40, (64, 96)),
    'open_gop': (lambda d: write_video(d / 'a.mp4', options={**B_FRAMES, 'x264-params': 'open-gop=1'}), 40, (64, 96)),
    'keys_only': (lambda d: write_video(d / 'a.mp4', options=dict(g='1')), 40, (64, 96)),
    'variable_rate': (lambda d: write_video(d / 'a.mp4', options=B_FRAMES, milliseconds=MILLISECONDS), 40, (64, 96)),
    'variable_rate_mkv': (
        lambda d: write_video(d / 'a.mkv', options=B_FRAMES, milliseconds=MILLISECONDS), 40, (64, 96)),
    'turned_left': (lambda d: write_video(d / 'a.mp4', rotation=90), 40, (96, 64)),
    'turned_right': (lambda d: write_video(d / 'a.mp4', rotation=-90), 40, (96, 64)),
    'upside_down': (lambda d: write_video(d / 'a.mp4', rotation=180), 40, (64, 96)),
    'odd_444': (lambda d: write_video(d / 'a.mp4', height=63, width=97, pix_fmt='yuv444p'), 40, (63, 97)),
    'odd_vp9': (lambda d: write_video(d / 'a.webm', height=63, width=97, codec='libvpx-vp9'), 40, (63, 97)),
    'audio_first': (lambda d: write_video(d / 'a.mp4', audio_first=True), 40, (64, 96)),
    'transport_stream': (lambda d: write_video(d / 'a.ts', options=B_FRAMES), 40, (64, 96)),
    'avi': (lambda d: write_video(d / 'a.avi', codec='mpeg4', options=B_FRAMES), 40, (64, 96)),
    'no_times': (lambda d: write_video(d / 'a.h264', options=B_FRAMES), 40, (64, 96)),
    'without_last_packet': (lambda d: without_last_packet(d, 'a.mp4', **FASTSTART), 39, (64, 96)),
    'in_last_packet': (lambda d: in_last_packet(d, 'a.mp4', **FASTSTART), 39, (64, 96)),
    'in_last_packet_mkv': (lambda d: in_last_packet(d, 'a.mkv'), 39, (64, 96)),
    'one_frame': (lambda d: write_video(d / 'a.mp4', num_frames=1), 1, (64, 96)),
}


def require(decoder):
    if decoder == 'torchcodec' and why_unavailable(decoder):
        pytest.skip(f'torchcodec does not load here: {why_unavailable(decoder)}')


def upright(frames, case):
    """Frames as they were encoded, to read the numbers in them."""
    turns = dict(turned_left=-1, turned_right=1, upside_down=2).get(case, 0)
    return torch.rot90(frames, turns, (2, 3))


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
    make, num_frames, size = CASES[request.param]
    return request.param, make(tmp_path_factory.mktemp(request.param)), num_frames, size


@pytest.mark.parametrize('decoder', DECODERS)
def test_frames_are_those_asked_for(case, decoder):
    require(decoder)
    name, path, num_frames, size = case
    video = Video(path, decoder, cache='')
    assert video.num_frames == num_frames
    frames = video.read(range(num_frames))
    assert frames.shape == (num_frames, 3, *size) and frames.dtype == torch.uint8
    numbers = read_numbers(upright(frames, name))
    # a cut file lacks the frame of its last packet, which with B frames is not the last to be shown
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(num_frames + (num_frames == 39)))

    rng = np.random.default_rng(0)
    picks = [[0], [-1]] + [rng.integers(-num_frames, num_frames, size).tolist() for size in (1, 1, 1, 2, 4, 8)]
    for pick in picks:
        assert torch.equal(video.read(pick), frames[pick]), pick


def test_both_decoders_give_the_same_frames(case):
    require('torchcodec')
    _, path, num_frames, _ = case
    for pick in (range(num_frames), [num_frames // 2, num_frames - 1]):
        assert torch.equal(*(Video(path, decoder, cache='').read(pick) for decoder in DECODERS))


def test_one_thread_and_several_give_the_same_frames(case, monkeypatch):
    _, path, num_frames, _ = case
    video, pick = Video(path, cache=''), [0, num_frames // 2, num_frames - 1]
    threads = []
    read = decode._READ['pyav']
    monkeypatch.setitem(decode._READ, 'pyav', lambda *args: threads.append(args[3]) or read(*args))
    several = video.read(pick)
    monkeypatch.setattr(torch.utils.data, 'get_worker_info', lambda: object())  # as in a loading process
    assert torch.equal(video.read(pick), several)
    assert threads == [0, 1]


def test_frames_have_the_colours_that_were_encoded(tmp_path):
    frames = Video(write_video(tmp_path / 'a.mp4', options=dict(qp='0'))).read([0, 20])
    for frame, number in zip(frames, (0, 20)):
        encoded = torch.from_numpy(numbered_frame(number)).permute(2, 0, 1)
        assert (frame.float() - encoded).abs().mean() < 4  # what is left is the coarser chroma


def test_times_are_those_of_the_file(tmp_path):
    video = Video(write_video(tmp_path / 'a.mkv', milliseconds=MILLISECONDS))
    assert np.allclose(video.times, (np.array(MILLISECONDS) - MILLISECONDS[0]) / 1000, atol=1e-6)
    constant = Video(write_video(tmp_path / 'b.mp4', num_frames=10, fps=25))
    assert np.allclose(constant.times, np.arange(10) / 25) and constant.fps == 25
    counted = Video(write_video(tmp_path / 'c.h264', num_frames=10, fps=25))
    assert np.allclose(counted.times, np.arange(10) / 25)


def test_bytes_are_as_good_as_a_file(tmp_path):
    path = write_video(tmp_path / 'a.mp4', options=B_FRAMES)
    content = Path(path).read_bytes()
    for decoder in DECODERS:
        if not why_unavailable(decoder):
            assert torch.equal(Video(content, decoder).read([3, 30]), Video(path, decoder, '').read([3, 30]))


def test_index_is_scanned_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    scans = []
    monkeypatch.setattr(decode, 'scan', lambda source: scans.append(source) or scan(source))
    path, cache = write_video(tmp_path / 'a.mp4', num_frames=20), str(tmp_path / 'cache')
    first, again = load_index(path, cache), load_index(path, cache)
    assert len(scans) == 1 and first.num_frames == again.num_frames == 20
    for name in ('pts', 'keys', 'seeks'):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.fps == again.fps and first.time_base == again.time_base and first.stream == again.stream

    os.utime(path, ns=(1, 1))
    load_index(path, cache)
    assert len(scans) == 2
    write_video(path, num_frames=10)
    assert load_index(path, cache).num_frames == 10

    for file in (tmp_path / 'cache').rglob('*.json'):
        file.write_bytes(b'damaged')
    assert load_index(path, cache).num_frames == 10 and len(scans) == 4
    load_index(path, cache)
    assert len(scans) == 4 and not list((tmp_path / 'cache').rglob('*.tmp'))
    load_index(path, '')
    load_index(path, '/proc/no/such/folder')  # a cache that cannot be written to costs time only
    assert len(scans) == 6


def test_default_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    Video(write_video(tmp_path / 'a.mp4', num_frames=2))
    assert len(list((tmp_path / 'cache/timm_ssm/frames').rglob('*.json'))) == 1


def damage(folder, kind):
    path = folder / 'a.mp4'
    if kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'no_video':
        path.write_text('not a video ' * 100)
    elif kind == 'header_only':
        truncated(write_video(path, **FASTSTART), packets(path)[0][0])
    elif kind == 'no_index':
        truncated(write_video(path), 4000)  # the table of an MP4 is at its end
    elif kind == 'noise':
        write_video(path, options=B_FRAMES)
        content, (position, size) = bytearray(path.read_bytes()), packets(path)[13]
        content[position:position + size] = b'\xff' * size
        path.write_bytes(content)
    return path


@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('kind', ('empty', 'no_video', 'header_only', 'no_index', 'missing', 'noise'))
def test_unreadable_files_raise_one_error_that_names_them(kind, decoder, tmp_path):
    require(decoder)
    path = damage(tmp_path, kind)
    with pytest.raises(ClipError, match=f'{path}: .') as error:
        Video(path, decoder).read(range(40))
    assert '\n' not in str(error.value)


def test_frames_outside_the_video_are_refused(tmp_path):
    video = Video(write_video(tmp_path / 'a.mp4', num_frames=5))
    for frames in ([5], [-6], []):
        with pytest.raises(ValueError, match='^frames: got .*, needs numbers of a video of 5 frames'):
            video.read(frames)


def test_folder_of_frames(tmp_path):
    for i in range(6):
        Image.fromarray(numbered_frame(i)).save(tmp_path / f'img_{i + 1:05}.jpg', quality=95)
    folder = FrameFolder(str(tmp_path), 6)
    frames = folder.read([5, 0, 0, -2])
    assert frames.shape == (4, 3, 64, 96) and read_numbers(frames) == [5, 0, 0, 4]
    (tmp_path / 'img_00003.jpg').write_bytes(b'no image')
    with pytest.raises(ClipError, match='img_00003.jpg'):
        folder.read([1, 2])
    with pytest.raises(ClipError, match='img_00007.jpg'):
        FrameFolder(str(tmp_path), 7).read([6])
    Image.fromarray(numbered_frame(2, height=32)).save(tmp_path / 'img_00003.jpg')
    with pytest.raises(ClipError, match='not of one size'):
        folder.read([1, 2])


@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('clips', (500, pytest.param(5000, marks=pytest.mark.slow)))
def test_memory_is_flat_over_many_clips(clips, decoder, tmp_path):
    require(decoder)
    paths = [write_video(tmp_path / f'{i}.mp4', num_frames=16, options=B_FRAMES, seed=i) for i in range(10)]

    def read(clips):
        for i in range(clips):
            Video(paths[i % 10], decoder, cache=str(tmp_path / 'cache')).read(range(0, 16, 2))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir('/proc/self/fd'))

    before, files = read(100)
    after, files_after = read(clips)
    assert after - before < 4096  # KB; a clip has 150
    assert files_after == files


def test_unavailable_decoders_say_why(monkeypatch):
    import builtins

    real = builtins.__import__

    def no_torchcodec(name, *args, **kwargs):
        if name.startswith('torchcodec'):
            raise RuntimeError('Could not load libtorchcodec. Likely causes:\n  1. FFmpeg')
        return real(name, *args, **kwargs)

    why_unavailable.cache_clear()
    monkeypatch.setattr(builtins, '__import__', no_torchcodec)
    try:
        with pytest.raises(ValueError, match=r"^decoder: got 'torchcodec', needs .*Could not load libtorchcodec"):
            decode.check_decoder('torchcodec')
        assert why_unavailable('pyav') is None
        with pytest.raises(ValueError, match='^decoder: got .*, needs one of pyav, torchcodec'):
            decode.check_decoder('decord')
    finally:
        why_unavailable.cache_clear()


def test_a_decoder_that_decodes_wrongly_is_not_available(monkeypatch):
    why_unavailable.cache_clear()
    try:
        monkeypatch.setattr(Video, 'read', lambda self, frames: torch.zeros(1, 3, 32, 32))
        assert why_unavailable('pyav') == 'its frames are not what was encoded'
    finally:
        why_unavailable.cache_clear()
