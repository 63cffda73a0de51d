"""What all parts share: contract identity, errors, limits, messages and their codec, and shared memory.

It holds no sockets, no processes and no clock; `luacell.protocol.memory` alone touches the operating system.
"""
