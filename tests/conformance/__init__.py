"""A server for the official MCP conformance suite: its fixtures over our tasks extension, store, engine and HTTP door.

`python -m tests.conformance --port N` serves it; `.ci/conformance` runs the suite against it.
"""
