"""Boxes of logical tensors and what they are made of: the words that all others speak."""
