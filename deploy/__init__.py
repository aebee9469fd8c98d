"""Composition and release: the only package that may know all the others, and that nobody imports."""
