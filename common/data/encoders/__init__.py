"""From one public column of the items to arrays: what is fitted to the catalogue, and how values are encoded with it.

A fitted encoder is a small pydantic model: it goes to JSON and comes back bit for bit. Whoever has it encodes an item
that comes later exactly as it would have been encoded before: no row's encoding depends on the other rows.
"""
