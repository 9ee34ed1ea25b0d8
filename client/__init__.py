"""What runs on a user's device: a thin ClientApp, cohort training, cohort evaluation."""
