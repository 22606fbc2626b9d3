"""Shared capacity: the pools, and whose turn it is."""
