"""Image/prompt/answer data: the synthetic pages task and any source with the same three columns."""
