"""What two processes tell each other about weights, as plain data."""
