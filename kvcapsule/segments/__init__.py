"""What attention can read: the segment, and the forms of its stored rows."""
