"""Shared memory and descriptors: sealed segments, the slots in them, and the sockets that carry descriptors.

The only part of the protocol that touches the operating system. What a worker writes into shared memory is
untrusted: readers here clamp lengths and compare numbers.
"""
