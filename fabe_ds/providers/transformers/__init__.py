"""Local models: loading, chat templates, decoding."""
