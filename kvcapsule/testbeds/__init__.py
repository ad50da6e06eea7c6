"""Data and parts of the two shipped test beds, pages-vlm and smol-vlm."""
