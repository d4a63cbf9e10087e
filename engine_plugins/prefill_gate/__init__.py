"""Refusing or shrinking a prefill before it runs the engine out of memory."""
