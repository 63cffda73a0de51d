-- Tells whether a byte is white space in ASCII.
return function(byte) return byte == 32 or (byte >= 9 and byte <= 13) end
