"""Training and evaluation: what train.py, validate.py, `timm-ssm train` and `timm-ssm validate` run."""
