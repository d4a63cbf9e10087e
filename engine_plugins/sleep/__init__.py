"""Sleep and wake: giving memory back, and proof of what is still resident."""
