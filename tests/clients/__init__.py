"""Clients of other makes against the real daemon, over its bridge and over HTTP: `.ci/clients` runs them."""
