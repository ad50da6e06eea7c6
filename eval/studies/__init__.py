"""Single studies, one figure each."""
