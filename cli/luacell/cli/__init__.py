"""The luacell command."""
