"""A Megatron rank's parameters, as boxes of HF tensors."""
