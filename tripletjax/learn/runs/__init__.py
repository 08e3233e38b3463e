"""Run directories: from a `Config` by way of defaults and a plan to a trained model."""
