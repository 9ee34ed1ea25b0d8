"""What server and client must agree on: the experiment's schema, data, model, metrics and wire format."""
