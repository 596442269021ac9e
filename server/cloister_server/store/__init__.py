"""Tables, sessions, blobs and the queries that are scoped to a principal. Knows SQL; knows nothing of HTTP or torch."""
