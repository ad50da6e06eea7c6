"""The capsule: a trained artefact, its files, its model card, the Hub."""
