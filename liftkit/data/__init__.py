"""Images, captions and the embedded demonstration data."""
