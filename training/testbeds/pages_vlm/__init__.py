"""Making pages-vlm, the small VLM that the project ships: a LLaVA trained from nothing on the pages task."""
