"""The worker host and its workers."""
