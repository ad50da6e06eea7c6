"""Suites: files that name methods, capsules and data sets to compare."""
