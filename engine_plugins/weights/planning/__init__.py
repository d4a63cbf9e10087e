"""Which bytes of which process go where, computed once."""
