"""Training of the two shipped VLMs, pages-vlm and smol-vlm."""
