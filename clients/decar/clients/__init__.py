"""Clients of a running server. They speak HTTP, and know nobody's internals."""
