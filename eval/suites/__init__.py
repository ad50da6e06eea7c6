"""Suites: options of `kvcapsule eval` kept as YAML files."""
