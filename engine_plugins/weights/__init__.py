"""Weights as plain data: where every element lies, which bytes to move, how they travel."""
