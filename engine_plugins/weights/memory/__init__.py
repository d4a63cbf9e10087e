"""Memory that peers may read or write, and what becomes of it."""
