"""`make liveness`: stuck states made on real engines, and how each of them ends."""
