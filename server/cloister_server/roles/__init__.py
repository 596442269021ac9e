"""The parties and the dealer of private inference as processes: identities, permissions, who waits for an answer. No SQL."""
