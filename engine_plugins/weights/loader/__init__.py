"""An engine's own weight loader: what it reads, and where it puts it."""
