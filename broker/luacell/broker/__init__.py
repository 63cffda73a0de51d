"""The broker: registry, dispatcher, books of shared memory, and the loop that acts on what they decide."""
