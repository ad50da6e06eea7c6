"""Training of pages-vlm, the small shipped VLM: a LLaVA trained from scratch on the pages task."""
