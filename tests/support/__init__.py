"""What tests share: builders of prefills, capsules and tiny models, runs and recorders."""
