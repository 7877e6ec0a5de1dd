"""Longer examples, which need packages of others: each has a page in the documentation."""
