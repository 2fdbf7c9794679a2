"""Models that answer: an engine that decodes many requests together, and what is put in front of it."""
