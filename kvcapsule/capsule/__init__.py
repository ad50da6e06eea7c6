"""Capsule: the trained artefact, its files, its model card, and the Hub."""
