"""The model: layers, then blocks, then the decoder; its cache, its sizes."""
