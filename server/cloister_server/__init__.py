"""The Cloister server: OAuth-gated training and serving of differentially private models."""
