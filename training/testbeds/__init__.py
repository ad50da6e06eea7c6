"""Making the two shipped VLMs, pages-vlm and smol-vlm."""
