"""Building blocks that the transformers and VAEs of several families share."""
