"""What runs on the server: a thin ServerApp, sampling, aggregation, the round loop and checkpoints."""
