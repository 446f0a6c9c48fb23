"""Checkpoints and the Hub: finding, converting, describing, publishing, classifying."""
