"""The sandbox: what is taken from a worker before its first line of Lua, for good.

    bpf         filters as programs                     calls      which system calls a level may make
    seccomp     putting a filter on a process           landlock   taking the file system away
    attributes  privileges, limits, memory, environment
    memory      how much of it a contract may have
    levels      which of these a level has, in which order, and what is said of them

Nothing is hidden inside Lua but at level `untrusted`, which has no FFI (`lua/untrusted.lua`): with FFI a contract
reaches all of its process, so only what the kernel refuses counts.
"""
