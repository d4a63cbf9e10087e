"""Offers that differ from what the trainer holds: copies in slots that stay."""
