"""The datasets of the pretrained tags, by what the tags call them."""
from typing import Dict, NamedTuple


class Dataset(NamedTuple):
    """A dataset and the number of its classes."""
    name: str
    abbreviation: str
    num_classes: int


DATASETS: Dict[str, Dataset] = {
    'in1k': Dataset('ImageNet-1k', 'IN1k', 1000),
    'in21k': Dataset('ImageNet-21k', 'IN21k', 21841),
    'k400': Dataset('Kinetics-400', 'K400', 400),
    'ssv2': Dataset('Something-Something V2', 'SSv2', 174),
    'breakfast': Dataset('Breakfast', 'Breakfast', 10),
    'hmdb51': Dataset('HMDB51', 'HMDB51', 51),
}
