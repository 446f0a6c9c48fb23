"""Videos with labels: folders by class, list files, tar shards, and Hugging Face datasets.

A reader of another kind of data is one class: a `ClipReader` whose constructor finds names and labels, and whose `open`
gives a video.
"""
import csv
import io
import json
import os
import re
import tarfile
from glob import glob
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import natural_key

from ..zoo.datasets import class_names
from .decode import FrameFolder, Video

VIDEO_SUFFIXES = (
    '.mp4', '.mkv', '.webm', '.avi', '.mov', '.m4v', '.mpg', '.mpeg', '.ts', '.flv', '.wmv', '.3gp', '.ogv')
KINDS = ('video', 'video-folder', 'video-list', 'video-wds', 'video-hfds/NAME')
SYNONYMS = (
    ('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'), ('test', 'testing'))

ClassMap = Union[None, str, Dict[str, int]]


class ClipReader:
    """Videos with labels, by row.

    Args:
        names: What scores and messages call the video of each row.
        labels: Class of each row, as a number or by name.
        class_map: Index of each class by its name, as a dict, as timm's files of them, or 'k400' and its like for the
            order of the released models; without one, names are numbered in their natural order.
    """
    decoder = 'pyav'  # see Video
    separator = ' '  # of columns in lists
    cache: Optional[str] = None

    def __init__(self, names: Sequence[str], labels: Sequence[Union[int, str]], class_map: ClassMap = None):
        if not len(names):
            raise ValueError(f'{self}: there is no video in it')
        self.names = names
        self.labels, self.class_to_idx = index_labels(labels, class_map, str(self))

    def __len__(self) -> int:
        return len(self.names)

    def label(self, row: int) -> int:
        return self.labels[row]

    def name(self, row: int) -> str:
        return self.names[row]

    def columns(self, row: int) -> List[str]:
        """A row as a line of a list."""
        return [self.name(row), str(self.label(row))]

    def duration(self, row: int) -> float:
        """Seconds that a video takes."""
        video = self.open(row)
        return video.times[-1] + 1 / video.fps

    def open(self, row: int) -> Union[Video, FrameFolder]:
        """The video of a row, to read frames from.

        Raises:
            ClipError: It is not there, or is no video.
        """
        raise NotImplementedError

    def _video(self, source: Union[str, bytes]) -> Video:
        return Video(source, self.decoder, self.cache)


def plain_name(name: str) -> str:
    """What is left of a class name where spelling varies: 'Pushing_[something]' and 'pushing something' are one."""
    return ' '.join(re.findall(r'[^\W_]+', name.lower()))


def index_labels(
        labels: Sequence[Union[int, str]],
        class_map: ClassMap,
        what: str = 'labels',
) -> Tuple[List[int], Dict[str, int]]:
    """Class indices of labels, and index by name.

    Args:
        labels: All numbers, or all names.
        class_map: As of ClipReader.
        what: Where they are from, for error messages.
    """
    class_to_idx = read_class_map(class_map) if class_map else {}
    numbers = [isinstance(label, int) or re.fullmatch(r'-?\d+', label) is not None for label in labels]
    if all(numbers):
        indices = [int(label) for label in labels]
        if min(indices) < 0:
            raise ValueError(f'{what}: got label {min(indices)}, needs numbers from 0')
        return indices, class_to_idx
    if any(numbers) and not class_to_idx:
        name = labels[numbers.index(False)]
        raise ValueError(f'{what}: got numbers and the name {name!r} for labels, needs one kind, or a class map')
    if not class_to_idx:
        class_to_idx = {name: i for i, name in enumerate(sorted(set(labels), key=natural_key))}
    by_name = {plain_name(name): i for name, i in class_to_idx.items()}
    unknown = [label for label in labels if plain_name(str(label)) not in by_name]
    if unknown:
        raise ValueError(
            f'{what}: got label {unknown[0]!r}, needs one of the {len(class_to_idx)} classes of the class map')
    return [by_name[plain_name(str(label))] for label in labels], class_to_idx


def read_class_map(class_map: Union[str, Dict[str, int]]) -> Dict[str, int]:
    """Index by class name, from a dict, a text file of names in order, a pickled dict, or for the released models of a
    dataset ('k400', ...)."""
    if isinstance(class_map, dict):
        return class_map
    if os.path.exists(class_map) and class_map.endswith(('.txt', '.pkl')):
        return load_class_map(class_map)
    try:
        return {name: i for i, name in enumerate(class_names(class_map))}
    except ValueError as e:
        raise ValueError(
            f'class_map: got {class_map!r}, needs a .txt file with a class name a line, a .pkl file of a dict, or a '
            f'dataset whose classes are known ({e})') from None


class FolderReader(ClipReader):
    """A folder with a folder of video files for each class."""

    def __init__(self, root: str, class_map: ClassMap = None):
        self.root = root
        files, classes = find_images_and_targets(root, types=VIDEO_SUFFIXES)
        folders = {i: name for name, i in classes.items()}
        if '' in classes:
            raise ValueError(f'{root}: got videos right in this folder, needs a folder of them for each class')
        super().__init__(
            [os.path.relpath(path, root) for path, _ in files], [folders[i] for _, i in files], class_map or classes)

    def __str__(self) -> str:
        return self.root

    def open(self, row: int) -> Video:
        return self._video(os.path.join(self.root, self.names[row]))


class _Line(NamedTuple):
    columns: List[str]
    name: str
    label: str
    frames: Optional[int] = None  # of a folder of them
    duration: Optional[float] = None


class ListReader(ClipReader):
    """A list file: 'path label', or 'folder frames label' for a folder with an image file for each frame.

    Columns are separated by tabs, commas or spaces, whichever of these is in the first line. After a video's label may
    come its duration in seconds, and whatever else.

    Args:
        path: The list.
        root: What paths in it are relative to; the folder of the list if None.
        class_map: As of ClipReader.
        frame_name: Names of the files in a folder of frames by their number, from 1, or from 0 if that is there.
    """

    def __init__(
            self,
            path: str,
            root: Optional[str] = None,
            class_map: ClassMap = None,
            frame_name: str = 'img_{:05}.jpg',
    ):
        self.path = path
        self.root = os.path.dirname(path) if root is None else root
        self.frame_name = frame_name
        self.lines = list(self._parse())
        super().__init__([line.name for line in self.lines], [line.label for line in self.lines], class_map)

    def __str__(self) -> str:
        return self.path

    def _parse(self):
        try:
            with open(self.path, newline='', encoding='utf-8-sig') as f:
                text = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f'{self.path}: cannot be read as a list: {e}') from e
        first = text.lstrip().partition('\n')[0]
        self.separator = separator = next((s for s in '\t,' if s in first), ' ')
        lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        for number, columns in enumerate(lines, 1):
            columns = [c.strip() for c in columns if c.strip()]
            if not columns:
                continue
            try:
                yield self._parse_line(columns, separator)
            except (ValueError, IndexError):
                raise ValueError(
                    f'{self.path}, line {number}: got {separator.join(columns)!r}, needs a path and a label, or a '
                    f'folder, its number of frames and a label') from None

    @staticmethod
    def _parse_line(columns: List[str], separator: str) -> _Line:
        # a path may hold the separator itself: it ends where a name of a video ends
        ends = [i for i, c in enumerate(columns, 1) if c.lower().endswith(VIDEO_SUFFIXES)]
        if not ends and len(columns) > 2:
            frames = int(columns[1])
            if frames < 1:
                raise ValueError
            return _Line(columns, columns[0], columns[-1], frames)
        end = ends[0] if ends else 1
        name, label, rest = separator.join(columns[:end]), columns[end], columns[end + 1:]
        if separator == ' ' and not re.fullmatch(r'-?\d+', label):
            return _Line(columns, name, ' '.join([label, *rest]))  # the name of a class, in words
        try:
            return _Line(columns, name, label, duration=float(rest[0]))
        except (ValueError, IndexError):
            return _Line(columns, name, label)

    def columns(self, row: int) -> List[str]:
        return self.lines[row].columns

    def duration(self, row: int) -> float:
        return self.lines[row].duration or super().duration(row)

    def open(self, row: int) -> Union[Video, FrameFolder]:
        line = self.lines[row]
        path = os.path.join(self.root, line.name)
        return self._video(path) if line.frames is None else FrameFolder(path, line.frames, self.frame_name)


class ShardReader(ClipReader):
    """Tar files in WebDataset's form: a video and its label under the same name, as 0001.mp4 and 0001.cls.

    The label is the text of a .cls file, or in a .json file under `target_key`. Shards are local files; where each
    video lies in them is read at the start, so that any order is as good as another.

    Args:
        shards: The files.
        class_map: As of ClipReader.
        target_key: Key of the label in .json files.
    """

    def __init__(self, shards: Sequence[str], class_map: ClassMap = None, target_key: str = 'label'):
        self.shards = sorted(shards, key=natural_key)
        self.target_key = target_key
        names, labels, self.places = [], [], []
        for shard in self.shards:
            for name, label, place in self._samples(shard):
                names.append(name)
                labels.append(label)
                self.places.append((shard, *place))
        super().__init__(names, labels, class_map)

    def __str__(self) -> str:
        return ', '.join([*self.shards[:2], '...'] if len(self.shards) > 3 else self.shards) or 'shards'

    def _samples(self, shard: str):
        samples: Dict[str, Dict[str, Any]] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    folder, file = os.path.split(member.name)
                    key, _, suffix = file.partition('.')
                    if not member.isfile() or not key:
                        continue
                    sample = samples.setdefault(os.path.join(folder, key), {})
                    if f'.{suffix}'.lower().endswith(VIDEO_SUFFIXES):
                        sample['place'] = (member.offset_data, member.size)
                    elif suffix == 'cls':
                        sample['label'] = tar.extractfile(member).read().decode().strip()
                    elif suffix == 'json':
                        sample.setdefault('label', json.load(tar.extractfile(member)).get(self.target_key))
        except (OSError, tarfile.TarError, ValueError) as e:
            raise ValueError(f'{shard}: cannot be read as a shard: {e}') from e
        for key, sample in samples.items():
            if 'place' in sample:
                if sample.get('label') is None:
                    raise ValueError(
                        f'{shard}: got {key} without a label, needs a .cls file, or {self.target_key!r} in .json')
                yield f'{os.path.basename(shard)}/{key}', sample['label'], sample['place']

    def open(self, row: int) -> Video:
        shard, offset, size = self.places[row]
        with open(shard, 'rb') as f:
            f.seek(offset)
            return self._video(f.read(size))


class HubReader(ClipReader):
    """A dataset of Hugging Face's `datasets` with a column of videos.

    Args:
        name: Of the dataset: on the Hub, or a folder.
        split: Which part of it.
        root: Cache folder; that of `datasets` if None.
        class_map: As of ClipReader.
        input_key: Column of the videos; the first that holds videos if None.
        target_key: Column of the labels.
    """

    def __init__(
            self,
            name: str,
            split: str,
            root: Optional[str] = None,
            class_map: ClassMap = None,
            input_key: Optional[str] = None,
            target_key: str = 'label',
    ):
        import datasets

        self.where = f'{name}, {split}'
        data = datasets.load_dataset(name, split=split, cache_dir=root)
        if input_key is None:
            input_key = next((key for key, f in data.features.items() if isinstance(f, datasets.Video)), None)
        for argument, key in (('input_key', input_key), ('target_key', target_key)):
            if key not in data.features:
                raise ValueError(f'{argument}: got {key!r}, needs a column of {name}: {", ".join(data.features)}')
        feature = data.features[target_key]
        labels, names = data[target_key], getattr(feature, 'names', None)
        if names and class_map is None:
            class_map = {label: i for i, label in enumerate(names)}
        self.videos = data.select_columns(input_key).cast_column(input_key, datasets.Video(decode=False))
        self.input_key = input_key
        super().__init__(
            [f'{i}' for i in range(len(data))], [names[i] for i in labels] if names else list(labels), class_map)

    def __str__(self) -> str:
        return self.where

    def open(self, row: int) -> Video:
        video = self.videos[row][self.input_key]
        return self._video(video['bytes'] or video['path'])


def _synonyms(split: str) -> Sequence[str]:
    found = next((names for names in SYNONYMS if split in names), ())
    return [split, *(name for name in found if name != split)]


def create_clip_reader(
        dataset: str,
        root: Optional[str],
        split: str,
        class_map: ClassMap = None,
        video_root: Optional[str] = None,
        frame_name: str = 'img_{:05}.jpg',
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        decoder: str = 'pyav',
        cache: Optional[str] = None,
) -> ClipReader:
    """The reader of a split.

    Args:
        dataset: One of KINDS; 'video' or '' for whichever of folders, a list and shards there is.
        root: A folder with the splits as folders, lists (train.csv, ...) or shards (train/*.tar, train-*.tar); or one
            list, or folder of videos or shards, without splits. For 'video-hfds', the cache folder.
        split: Name of the split, or one of its usual synonyms.
        class_map: As of ClipReader.
        video_root: What paths in a list are relative to; the folder of the list if None.
        frame_name: As of ListReader.
        input_key: As of HubReader.
        target_key: As of HubReader and ShardReader.
        decoder: As of Video.
        cache: As of Video.
    """
    kind, _, name = dataset.partition('/')
    target = dict(target_key=target_key) if target_key else {}
    if kind == 'video-hfds' and name:
        reader = HubReader(name, split, root or None, class_map, input_key or None, **target)
    elif dataset not in ('', *KINDS):
        raise ValueError(f'dataset: got {dataset!r}, needs one of {", ".join(KINDS)}')
    elif not root or not os.path.exists(root):
        raise ValueError(f'data: got {root!r}, needs a folder of videos by class, a list file, or a folder of shards')
    else:
        found = dict(_find(root, split))
        kind = {'': 'video'}.get(dataset, dataset)
        if kind == 'video':
            kind = next(iter(found), None)
        if kind not in found:
            raise ValueError(
                f'data: got {root!r}, needs in it a list, shards or folders of videos for the split {split!r}')
        if kind == 'video-list':
            reader = ListReader(found[kind], video_root, class_map, frame_name)
        elif kind == 'video-wds':
            reader = ShardReader(found[kind], class_map, **target)
        else:
            reader = FolderReader(found[kind], class_map)
    reader.decoder, reader.cache = decoder, cache
    return reader


def _find(root: str, split: str):
    """Kinds of data of a split, and where they are, the likeliest first."""
    if os.path.isfile(root):
        yield ('video-wds', [root]) if root.endswith('.tar') else ('video-list', root)
        return
    folders = [os.path.join(root, name) for name in _synonyms(split) if os.path.isdir(os.path.join(root, name))]
    lists = [
        path for name in _synonyms(split) for suffix in ('', '.csv', '.txt', '.tsv', '.list')
        if os.path.isfile(path := os.path.join(root, name + suffix))]
    if lists:
        yield 'video-list', lists[0]
    for pattern in [*(f'{folder}/*.tar' for folder in folders), *(f'{root}/{n}-*.tar' for n in _synonyms(split))]:
        if shards := glob(pattern):
            yield 'video-wds', shards
            return
    if shards := glob(f'{root}/*.tar'):
        yield 'video-wds', shards
    if folders:
        yield 'video-folder', folders[0]
    elif not any(os.path.isdir(os.path.join(root, name)) for names in SYNONYMS for name in names):
        yield 'video-folder', root
