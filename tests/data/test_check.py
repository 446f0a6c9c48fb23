"""`timm-ssm check-videos`."""
import pytest

from timm_ssm.cli import main
from timm_ssm.data import create_clip_reader

from .videos import packets, write_dataset, write_video


@pytest.fixture
def folder(tmp_path):
    """Six videos, of which one is empty and one lacks the data of a frame in the middle."""
    write_dataset(tmp_path / 'clips', videos=3, num_frames=8)
    (tmp_path / 'clips/a/1.mp4').write_bytes(b'')
    path = tmp_path / 'clips/b/2.mp4'
    content, (position, size) = bytearray(path.read_bytes()), packets(path)[3]
    content[position:position + size] = b'\xff' * size
    path.write_bytes(content)
    return tmp_path


@pytest.mark.parametrize('workers', (0, 2))
def test_list(folder, capsys, workers):
    names = [f'{c}/{i}.mp4' for c in 'ab' for i in range(3)]
    path = folder / 'all.csv'
    path.write_text(''.join(f'clips/{name},{name[0]},extra\n' for name in names))
    assert main(['check-videos', str(path), '-j', str(workers)]) == 1
    out = capsys.readouterr().out
    assert '2 of 6 videos cannot be read' in out and out.count('.mp4: ') >= 2
    assert (folder / 'all.good.csv').read_text().splitlines() == [
        f'clips/{name},{name[0]},extra' for name in names if name not in ('a/1.mp4', 'b/2.mp4')]
    bad = (folder / 'all.bad.csv').read_text().splitlines()
    assert [line.split(',')[:3] for line in bad] == [['clips/a/1.mp4', 'a', 'extra'], ['clips/b/2.mp4', 'b', 'extra']]
    assert all('.mp4: ' in line for line in bad)

    assert main(['check-videos', str(folder / 'all.good.csv'), '-j', '0']) == 0
    assert '0 of 4 videos cannot be read' in capsys.readouterr().out


def test_folder(folder, tmp_path):
    good, bad = tmp_path / 'good.txt', tmp_path / 'bad.txt'
    assert main(['check-videos', str(folder / 'clips'), '-j', '1', '--good', str(good), '--bad', str(bad)]) == 1
    reader = create_clip_reader('video-list', str(good), 'any', video_root=str(folder / 'clips'))
    assert [reader.label(i) for i in range(4)] == [0, 0, 1, 1]
    assert all(reader.open(i).num_frames == 8 for i in range(4))
    assert [line.split()[:2] for line in bad.read_text().splitlines()] == [['a/1.mp4', '0'], ['b/2.mp4', '1']]


def test_names_with_separators_stay_whole(tmp_path):
    (tmp_path / 'x y').mkdir()
    write_video(tmp_path / 'x y/a b.mp4', num_frames=2)
    (tmp_path / 'list.txt').write_text('"x y/a b.mp4" 0\n')
    assert main(['check-videos', str(tmp_path / 'list.txt'), '-j', '0']) == 0
    assert (tmp_path / 'list.good.txt').read_text() == '"x y/a b.mp4" 0\n'
    assert (tmp_path / 'list.bad.txt').read_text() == ''


def test_errors_are_one_line(tmp_path, capsys):
    assert main(['check-videos', str(tmp_path / 'none.csv')]) == 1
    error = capsys.readouterr().err
    assert error.startswith("timm-ssm check-videos: data: got '") and error.count('\n') == 1
