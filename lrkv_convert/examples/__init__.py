"""What models read: texts, pairs of texts, speech."""
