"""What is said of this machine's memory, GPUs and network cards."""
