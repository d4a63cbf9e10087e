"""How bytes travel between a trainer's memory and an engine's: one Protocol, several wires."""
