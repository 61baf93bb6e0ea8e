"""What all rooms need: errors, files, chunks, keys, tensor arithmetic, strict config. Imports no other room."""
