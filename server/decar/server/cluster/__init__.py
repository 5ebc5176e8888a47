"""Hosts that Ray has: which there are, what runs where, and what decar has on each beside its engines."""
