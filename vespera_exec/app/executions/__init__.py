"""The engine interface of document 003, for Python programs."""
