"""The recommender: embedding, attention, encoder and losses, each written for a cohort of users."""
