"""Checkpoints on their way to and from the Hub: reading, converting, describing, publishing, trying out."""
