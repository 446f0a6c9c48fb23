"""The data of a run."""


import pytest

from timm_ssm.training import data

from .utils import run

COLOUR = ['--in-chans', 3]


class TestData:

    def test_what_is_wrong_with_it(self, digits, tmp_path):
        for flags, message in {
            ('--val-split', 'nowhere'): "no folder 'nowhere' in",
            ('--train-split', 'nowhere'): "no folder 'nowhere' in",
            ('--num-classes', '9'): 'the dataset has 10 classes',
            ('--batch-size', '500'): 'the 160 training images do not fill one batch',
        }.items():
            with pytest.raises(SystemExit, match=message):
                run(digits, tmp_path, '--epochs', 1, *flags)
        with pytest.raises(SystemExit, match='no dataset at'):
            run(tmp_path / 'nowhere', tmp_path)
        other = tmp_path / 'other'
        for split, classes in (('train', 'abc'), ('validation', 'abd')):
            for name in classes:
                (other / split / name).mkdir(parents=True)
                source = digits / 'train' / 'class_0' / '00.png'
                (other / split / name / '0.png').write_bytes(source.read_bytes())
        with pytest.raises(SystemExit, match=r"different classes: \['c', 'd'\]"):
            run(other, tmp_path, '--batch-size', 2)

    def test_reader_by_name(self, digits, tmp_path, monkeypatch):
        names, create_dataset = [], data.create_dataset

        def recording(name, **kwargs):
            names.append(name)
            return create_dataset(name, **kwargs)

        monkeypatch.setattr(data, 'create_dataset', recording)
        run(digits, tmp_path, '--epochs', 1, '--dataset', 'torch/image_folder', *COLOUR)
        assert names == ['torch/image_folder'] * 2
