"""Which luacell this is."""

__version__ = "0.1.0"  # the only place: the packaging reads it from here
