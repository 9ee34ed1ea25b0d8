"""A deployment over real machines: its folder, its keys and certificates, its processes."""
