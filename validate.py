#!/usr/bin/env python3
"""Measure the accuracy of models on an image dataset.

    python validate.py DATA --model videomamba_tiny_patch16_224 --pretrained
    python validate.py DATA --model 'videomamba_*' vit_tiny_patch16_224      # names, wildcards, files of names
    python validate.py DATA --checkpoint output/train/run/model_best.pth.tar # the checkpoint says which model it is
    python validate.py DATA --checkpoint output/train/run                    # every checkpoint of a folder

DATA holds a folder of images for each class, or the splits of such a dataset; `--dataset` names any other timm reader.
The flags are those of timm's validate.py. An installed package does the same by `timm-ssm validate`.
"""
from timm_ssm.training.validate import main

if __name__ == '__main__':
    main()
