"""Flax modules and their sharding rules."""
