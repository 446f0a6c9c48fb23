import pytest
import timm

from timm_ssm.hub import classify
from timm_ssm.zoo import DATASETS, class_names
from timm_ssm.zoo.datasets import trained_on
from timm_ssm.zoo.registry import list_names


def test_kinetics_classes_are_in_the_order_of_the_released_weights():
    """It is not the alphabetical one, which would name nearly every class wrongly."""
    names = class_names('k400')
    assert len(names) == len(set(names)) == 400 and list(names) != sorted(names)
    known = {0: 'riding a bike', 1: 'marching', 2: 'dodgeball', 341: 'abseiling', 399: 'playing badminton'}
    assert {i: names[i] for i in known} == known


@pytest.mark.parametrize('dataset, first', [
    ('ssv2', 'Approaching [something] with your camera'), ('hmdb51', 'brush_hair'), ('breakfast', 'cereals')])
def test_class_names(dataset, first):
    names = class_names(dataset)
    assert len(names) == len(set(names)) == DATASETS[dataset].num_classes and names[0] == first


def test_unknown_dataset():
    with pytest.raises(ValueError, match="dataset: got 'in1k', needs one of 'k400', 'ssv2', 'hmdb51', 'breakfast'"):
        class_names('in1k')


@pytest.mark.parametrize('name', list_names(pretrained=True))
def test_a_tag_has_the_classes_of_its_last_dataset(name):
    dataset = trained_on(name.partition('.')[2])[-1]
    assert timm.get_pretrained_cfg(name).num_classes == DATASETS[dataset].num_classes


@pytest.mark.parametrize('tag, names', [
    ('videomamba_tiny_patch16_f8_224.k400', ['riding a bike', 'marching']),
    ('videomamba_middle_patch16_f32_224.breakfast_mask_ft', ['cereals', 'coffee']),
    ('videomamba_tiny_patch16_224.in1k', ['tench, Tinca tinca', 'goldfish, Carassius auratus'])])
def test_class_names_of_a_model(tag, names):
    model = timm.create_model(tag, depth=1, device='meta')
    assert classify.class_names(model)[:2] == names
    model = timm.create_model(tag, depth=1, device='meta', num_classes=7)
    assert classify.class_names(model)[:2] == ['class 0', 'class 1']
