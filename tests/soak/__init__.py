"""`make soak`: what hundreds of updates and sleeps leave in a server's processes and files."""
