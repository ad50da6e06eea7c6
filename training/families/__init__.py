"""How each codec family is trained."""
