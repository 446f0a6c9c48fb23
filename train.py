#!/usr/bin/env python3
"""Train an image classifier.

    python train.py DATA --model videomamba_tiny_patch16_224 --num-classes 10 --opt adamw --lr 5e-4
    python train.py --config FILE.yaml --data-dir DATA                        # flags from a file, in timm's names
    python train.py ... --experiment run --resume auto                        # start, or go on where it was stopped
    torchrun --nproc-per-node 8 train.py DATA --model ...                     # one process for each GPU

DATA holds the folders `train` and `validation` with a folder of images for each class; `--dataset` names any other timm
reader. Flags, their defaults and the files written are those of timm's train.py, and so are the parts: datasets,
augmentation, optimisers, schedules and tasks come from timm. Where it differs:

- All randomness is a function of the seed, process, epoch and batch. A run that was stopped or killed and then resumed
  ends with bitwise the weights of one that was not, as far as the device's arithmetic repeats itself.
- A file appears under its name only when it is complete, and a run does not overwrite another one's.
- A loss that is not finite ends the run.

An installed package does the same by `timm-ssm train`.
"""
from timm_ssm.training.train import main

if __name__ == '__main__':
    main()
