"""Tests of the project; a package, because installed libraries also have one of this name."""
