"""Videos with labels in all the forms that people have them."""
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from timm_ssm.data import ClipError, ClipReader, Video, create_clip_reader
from timm_ssm.data.readers import ListReader, index_labels

from .videos import numbered_frame, read_numbers, write_video


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Content of videos of 5, 6, 7 and 8 frames."""
    folder = tmp_path_factory.mktemp('videos')
    return [Path(write_video(folder / f'{n}.mp4', num_frames=n)).read_bytes() for n in (5, 6, 7, 8)]


def frame_counts(reader):
    return [reader.open(row).num_frames for row in range(len(reader))]


def labels(reader):
    return [reader.label(row) for row in range(len(reader))]


def test_folder_by_class(tmp_path, videos):
    for split in ('train', 'val'):
        for i, name in enumerate(('b/x.mp4', 'a/y.MP4', 'a10/sub folder/z.mkv', 'a9/w.webm')):
            file = tmp_path / split / name
            file.parent.mkdir(parents=True)
            file.write_bytes(videos[i])
    (tmp_path / 'train/a/notes.txt').write_text('no video')
    reader = create_clip_reader('', str(tmp_path), 'validation')
    assert reader.class_to_idx == {'a': 0, 'a9': 1, 'b': 2, 'sub folder': 3}
    found = {reader.name(i): (reader.label(i), reader.open(i).num_frames) for i in range(len(reader))}
    assert found == {'a/y.MP4': (0, 6), 'a9/w.webm': (1, 8), 'b/x.mp4': (2, 5), 'a10/sub folder/z.mkv': (3, 7)}

    names = {'Sub_Folder': 0, 'B': 5, 'a 9': 1, 'a': 9, 'A9': 4}
    mapped = create_clip_reader('video-folder', str(tmp_path), 'train', class_map=names)
    assert {mapped.name(i): mapped.label(i) for i in range(4)} == {
        'a/y.MP4': 9, 'a9/w.webm': 4, 'b/x.mp4': 5, 'a10/sub folder/z.mkv': 0}
    with pytest.raises(ValueError, match="got label 'b', needs one of the 3 classes"):
        create_clip_reader('video-folder', str(tmp_path), 'train', class_map={'a': 0, 'a9': 1, 'sub folder': 2})


@pytest.mark.parametrize('text', (
    'a b.mp4 3\nc.mp4 0\n\nd.mp4 1 17.5 more\n',
    'a b.mp4,3\nc.mp4,0\nd.mp4,1,17.5,more\n',
    'a b.mp4\t3\r\nc.mp4\t0\r\nd.mp4\t1\t17.5\tmore\r\n',
    '\ufeff"a b.mp4" 3\nc.mp4  0\nd.mp4 1 17.5\n',
    '"a b.mp4", 3\nc.mp4, 0\nd.mp4, 1, 17.5\n',
))
def test_list_of_videos(tmp_path, videos, text):
    for i, name in enumerate(('a b', 'c', 'd')):
        (tmp_path / f'{name}.mp4').write_bytes(videos[i])
    (tmp_path / 'val.csv').write_bytes(text.encode())
    reader = create_clip_reader('', str(tmp_path), 'validation')
    assert isinstance(reader, ListReader) and labels(reader) == [3, 0, 1] and frame_counts(reader) == [5, 6, 7]
    assert reader.name(0) == 'a b.mp4' and reader.duration(2) == 17.5 and reader.duration(1) == pytest.approx(6 / 25)


def test_list_with_names_of_classes(tmp_path):
    path = tmp_path / 'train.txt'
    path.write_text('a.mp4 riding a bike\nb.mp4 marching\nc.mp4 Riding_a_bike\n')
    assert ListReader(str(path), class_map={'riding a bike': 0, 'marching': 1}).labels == [0, 1, 0]
    (tmp_path / 'names.txt').write_text('marching\nRiding a Bike\n')
    assert ListReader(str(path), class_map=str(tmp_path / 'names.txt')).labels == [1, 0, 1]
    path.write_text('a.mp4 riding a bike\nb.mp4 marching\n')
    reader = ListReader(str(path))
    assert reader.labels == [1, 0] and reader.class_to_idx == {'marching': 0, 'riding a bike': 1}


def test_list_root(tmp_path, videos):
    (tmp_path / 'files').mkdir()
    (tmp_path / 'lists').mkdir()
    (tmp_path / 'files/a.mp4').write_bytes(videos[0])
    (tmp_path / 'b.mp4').write_bytes(videos[1])
    (tmp_path / 'lists/all.csv').write_text(f'a.mp4 0\n{tmp_path}/b.mp4 1\n')
    files = str(tmp_path / 'files')
    reader = create_clip_reader('video-list', str(tmp_path / 'lists/all.csv'), 'train', video_root=files)
    assert frame_counts(reader) == [5, 6]  # an absolute path stays
    by_split = create_clip_reader('video', str(tmp_path / 'lists'), 'all', video_root=files)
    assert len(by_split) == 2


def test_list_of_frame_folders(tmp_path):
    for first, name in enumerate(('zero', 'one')):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(numbered_frame(i)).save(tmp_path / name / f'{i + first:06d}.jpg', quality=95)
    (tmp_path / 'val.csv').write_text('zero 4 7\none 3 ignored 8\n')
    reader = create_clip_reader('', str(tmp_path), 'val', frame_name='{:06d}.jpg')
    assert labels(reader) == [7, 8] and frame_counts(reader) == [4, 3]
    for row in range(2):
        assert read_numbers(reader.open(row).read([2, 0])) == [2, 0]
    with pytest.raises(ValueError, match='does not say when'):
        reader.duration(0)


@pytest.mark.parametrize('text, message', (
    ('a.mp4\n', "line 1: got 'a.mp4', needs a path and a label"),
    ('a.mp4 0\nfolder many 3\n', "line 2: got 'folder many 3', needs"),
    ('folder 0 3\n', 'line 1: got'),
    ('a.mp4 0\nb.mp4 first\n', "got numbers and the name 'first'"),
    ('a.mp4 -1\n', 'got label -1, needs numbers from 0'),
    ('\n', 'there is no video in it'),
))
def test_bad_lists_say_where(tmp_path, text, message):
    path = tmp_path / 'train.csv'
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ListReader(str(path))
    assert str(path) in str(error.value)


def write_shard(path, samples):
    with tarfile.open(path, 'w') as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_shards(tmp_path, videos):
    write_shard(tmp_path / 'train-0.tar', {
        '000/a.mp4': videos[0], '000/a.cls': b'2\n', '000/b.json': b'{"label": 1, "other": 5}', '000/b.mp4': videos[1]})
    write_shard(tmp_path / 'train-1.tar', {'c.cls': b'0', 'c.seg.mp4': videos[2], 'readme.txt': b'no sample'})
    write_shard(tmp_path / 'val-0.tar', {'d.json': b'{"label": 1, "other": 5}', 'd.mp4': videos[3]})
    reader = create_clip_reader('', str(tmp_path), 'train')
    assert labels(reader) == [2, 1, 0] and frame_counts(reader) == [5, 6, 7]
    assert reader.name(0) == 'train-0.tar/000/a'
    assert create_clip_reader('video-wds', str(tmp_path), 'validation', target_key='other').labels == [5]
    assert frame_counts(create_clip_reader('', str(tmp_path / 'val-0.tar'), 'any')) == [8]

    write_shard(tmp_path / 'val-0.tar', {'e.mp4': videos[3]})
    with pytest.raises(ValueError, match='got e without a label'):
        create_clip_reader('video-wds', str(tmp_path), 'val')
    (tmp_path / 'val-0.tar').write_bytes(b'no tar')
    with pytest.raises(ValueError, match='val-0.tar: cannot be read as a shard'):
        create_clip_reader('video-wds', str(tmp_path), 'val')


def test_hub_dataset(tmp_path, videos):
    datasets = pytest.importorskip('datasets')
    column = [dict(bytes=video, path=None) for video in videos[:3]]
    data = datasets.Dataset.from_dict(
        dict(clip=column, label=[1, 0, 1], number=[4, 5, 6], words=['x', 'y', 'x']),
        features=datasets.Features(dict(
            clip=datasets.Video(decode=False), label=datasets.ClassLabel(names=['walk', 'run']),
            number=datasets.Value('int64'), words=datasets.Value('string'))))
    (tmp_path / 'set').mkdir()
    data.to_parquet(tmp_path / 'set/train.parquet')
    kind, cache = f'video-hfds/{tmp_path}/set', str(tmp_path / 'cache')
    reader = create_clip_reader(kind, cache, 'train')
    assert labels(reader) == [1, 0, 1] and reader.class_to_idx == {'walk': 0, 'run': 1}
    assert frame_counts(reader) == [5, 6, 7]
    assert read_numbers(reader.open(1).read([4])) == [4]
    assert create_clip_reader(kind, cache, 'train', class_map={'Run': 7, 'walk': 3}).labels == [7, 3, 7]
    assert create_clip_reader(kind, cache, 'train', target_key='number').labels == [4, 5, 6]
    assert create_clip_reader(kind, cache, 'train', target_key='words').labels == [0, 1, 0]
    with pytest.raises(ValueError, match="^target_key: got 'kind', needs a column of .*: clip, label"):
        create_clip_reader(kind, cache, 'train', target_key='kind')


def test_another_reader_is_one_class(videos):
    class Memory(ClipReader):
        def __init__(self, contents):
            self.contents = contents
            super().__init__([f'clip {i}' for i in range(len(contents))], ['b', 'a'])

        def open(self, row):
            return self._video(self.contents[row])

    reader = Memory(videos[:2])
    assert len(reader) == 2 and labels(reader) == [1, 0] and frame_counts(reader) == [5, 6]
    assert isinstance(reader.open(0), Video) and reader.duration(0) == pytest.approx(.2)


def test_missing_video_is_found_when_it_is_opened(tmp_path):
    (tmp_path / 'train.csv').write_text('gone.mp4 0\n')
    reader = create_clip_reader('', str(tmp_path), 'train')
    with pytest.raises(ClipError, match='gone.mp4: No such file'):
        reader.open(0)


@pytest.mark.parametrize('kwargs, message', (
    (dict(dataset='video-disc'), "^dataset: got 'video-disc', needs one of video, video-folder"),
    (dict(dataset='video-hfds'), '^dataset: got'),
    (dict(root='/no/such/folder'), "^data: got '/no/such/folder', needs a folder"),
    (dict(split='test'), "^data: got .*, needs in it a list, shards or folders of videos for the split 'test'"),
    (dict(dataset='video-list'), '^data: got'),
    (dict(class_map='names.json'), "^class_map: got 'names.json', needs a .txt file"),
))
def test_errors_name_the_argument(tmp_path, videos, kwargs, message):
    (tmp_path / 'train/a').mkdir(parents=True)
    (tmp_path / 'train/a/x.mp4').write_bytes(videos[0])
    with pytest.raises(ValueError, match=message):
        create_clip_reader(**{'dataset': '', 'root': str(tmp_path), 'split': 'train', **kwargs})


def test_videos_outside_of_class_folders_are_refused(tmp_path, videos):
    (tmp_path / 'x.mp4').write_bytes(videos[0])
    with pytest.raises(ValueError, match='needs a folder of them for each class'):
        create_clip_reader('', str(tmp_path), 'train')


def test_names_of_a_dataset_get_the_indices_of_its_released_models(tmp_path):
    (tmp_path / 'val.txt').write_text('a.mp4 Abseiling\nb.mp4 playing_badminton\nc.mp4 riding a bike\n')
    reader = ListReader(str(tmp_path / 'val.txt'), class_map='k400')
    assert reader.labels == [341, 399, 0]  # by no means alphabetical
    assert len(reader.class_to_idx) == 400
    (tmp_path / 'val.txt').write_text('a.mp4 341\n')
    assert ListReader(str(tmp_path / 'val.txt'), class_map='k400').labels == [341]


def test_names_match_whatever_their_spelling():
    known = {'Pushing [something] from left to right': 0, 'petting animal (not cat)': 1}
    found, _ = index_labels(['petting_animal_(not_cat)', 'pushing something from left to right'], known)
    assert found == [1, 0]


def test_names_of_kinetics_stay_apart_whatever_their_spelling():
    from timm_ssm.data.readers import plain_name

    names = json.loads((Path(__file__).parent.parent / 'fixtures/video_labels.json').read_text())
    for dataset in ('k400', 'ssv2', 'hmdb51', 'breakfast'):
        assert len({plain_name(name) for name in names[dataset]}) == len(names[dataset]) > 0
