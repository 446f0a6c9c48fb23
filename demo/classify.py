"""Classify an image with a checkpoint of train.py.

    python demo/classify.py IMAGE --checkpoint FOLDER/model_best.pth.tar
"""
import argparse
from pathlib import Path

import timm
import torch
from PIL import Image

import timm_ssm  # noqa: F401  registers the models


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('image', type=Path)
    parser.add_argument('--checkpoint', type=Path, required=True)
    parser.add_argument('--top', type=int, default=3, metavar='N', help='number of classes to show')
    args = parser.parse_args()

    # the checkpoint knows how its model was made, the file beside it what its classes are called
    trained = torch.load(args.checkpoint, map_location='cpu', weights_only=True)['args']
    names = (args.checkpoint.parent / 'classes.txt').read_text().split('\n')
    in_chans, *img_size = trained['input_size']
    model = timm.create_model(
        trained['model'],
        checkpoint_path=str(args.checkpoint),
        num_classes=trained['num_classes'],
        global_pool=trained['gp'],
        in_chans=in_chans,
        img_size=img_size,
        **trained['model_kwargs'],
    ).eval()
    config = timm.data.resolve_data_config(trained, model=model)
    image = Image.open(args.image).convert('RGB' if in_chans == 3 else 'L')
    with torch.inference_mode():
        probabilities = model(timm.data.create_transform(**config)(image)[None]).softmax(dim=1)[0]

    print(f'{args.image}:')
    for probability, index in zip(*(values.tolist() for values in probabilities.topk(args.top))):
        print(f'  {probability:6.1%}  {names[index]}')


if __name__ == '__main__':
    main()
