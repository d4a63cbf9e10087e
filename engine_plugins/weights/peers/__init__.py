"""Meeting other processes, and what the links to them give."""
