"""Reading, preparing and opening behaviour sequences and the public catalogue."""
