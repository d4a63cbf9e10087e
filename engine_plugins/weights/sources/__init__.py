"""What a trainer offers, as boxes with the memory that holds them."""
