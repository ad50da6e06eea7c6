"""Data sets and model parts of the two shipped test beds, pages-vlm and smol-vlm."""
